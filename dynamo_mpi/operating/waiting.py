# SPDX-License-Identifier: Apache-2.0
"""Waits until a deployment is ready and has answered, or can't become ready any more, or the time is up."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynamo_mpi.errors import (
    AuthorisationError,
    BootstrapError,
    DeadlineError,
    DiscoveryError,
    EngineError,
    TemporaryError,
)
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.operating.place import locate
from dynamo_mpi.operating.readiness import Lack, hopeless, is_whole, lacks_of, models_of
from dynamo_mpi.operating.snapshot import ETCD_SECONDS, read_snapshot
from dynamo_mpi.operating.untrusted import shown
from dynamo_mpi.operating.wording import spell_failure, spell_seconds
from dynamo_mpi.services.bounded import within
from dynamo_mpi.services.failures import StepFailed
from dynamo_mpi.services.news import News

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.local.ask import Answer
    from dynamo_mpi.operating.place import Place
    from dynamo_mpi.operating.snapshot import Snapshot
    from dynamo_mpi.operating.views import Failure

POLL_SECONDS = 1.0
NEWS_SECONDS = (5.0, 120.0)
# what ended before we came may be about to be started again, in the same folder
_AT_ONCE_SECONDS = 2.0
STALE_SECONDS = 10.0
# between the end of one and the start of the next, a folder may have the credentials of neither
REFUSALS = 3
QUESTION, ANSWER_TOKENS, ANSWER_SECONDS = "Say hello.", 8, 60.0


@dataclass(frozen=True)
class Request:
    """What is waited for.

    Args:
        run_dir: the deployment's folder; None finds one.
        namespace: only its workers.
        model: only its workers.
        roles: that have to serve; empty: all that is needed.
        frontend: URL to prove it by; empty: what the run folder says.
        timeout: seconds.
    """

    run_dir: Path | None
    namespace: str | None
    model: str | None
    roles: tuple[str, ...]
    frontend: str
    timeout: float


@dataclass
class Outcome:
    """How the wait has ended.

    Args:
        seconds: that it took.
        snapshot: what was seen last.
        lacks: what wasn't ready.
        answers: the completions that came back, by model.
        error: why it isn't ready; None when it is.
        exit_code: of the command.
    """

    seconds: float = 0.0
    snapshot: Snapshot | None = None
    lacks: list[Lack] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    error: BootstrapError | None = None
    exit_code: int = ExitCode.OK


class Wait:
    """One wait.

    Args:
        request: for what.
        environ: this process's.
        say: takes one line.
    """

    def __init__(self, request: Request, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._request, self._environ, self._say = request, environ, say
        self._began, self._began_at = time.monotonic(), time.time()
        self._end = self._began + request.timeout
        self._known: set[tuple[str, float]] | None = None
        self._refusals = 0
        self._trouble: BootstrapError | None = None
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Wait.

        Raises:
            UsageError: it can't be told which deployment is meant, or what is set for etcd can't be used.
        """
        outcome, news = self._outcome, News(*NEWS_SECONDS)
        try:
            while not self._is_ready():
                if time.monotonic() >= self._end:
                    raise self._late()
                if news.due():
                    self._tell()
                time.sleep(max(0.0, min(POLL_SECONDS, self._end - time.monotonic())))
        except StepFailed as error:
            outcome.error, outcome.exit_code = error, error.status
        except (AuthorisationError, DiscoveryError, DeadlineError, TemporaryError) as error:
            outcome.error, outcome.exit_code = error, error.exit_code
        outcome.seconds = time.monotonic() - self._began
        return outcome

    def _is_ready(self) -> bool:
        request, outcome = self._request, self._outcome
        place = locate(request.run_dir, self._environ)
        self._require_not_ended(place)
        self._trouble = None
        if place.environ is None:
            if place.deployment is not None:
                outcome.lacks = [Lack("services", "not up yet")]
            else:
                outcome.lacks = [Lack("deployment", f"none runs in {place.run_dir}")]
            return False
        try:
            seconds = min(ETCD_SECONDS, max(1.0, self._end - time.monotonic()))
            snapshot = read_snapshot(place, request.namespace, request.model, seconds)
        except DiscoveryError as error:
            self._trouble = error
            outcome.lacks = [Lack("etcd", error.found)]
            return False
        except AuthorisationError as error:
            self._refusals, self._trouble = self._refusals + 1, error
            if self._refusals >= REFUSALS:
                raise
            outcome.lacks = [Lack("etcd", error.found)]
            return False
        self._refusals = 0
        outcome.snapshot, outcome.lacks = snapshot, lacks_of(snapshot, request.roles)
        if failure := hopeless(snapshot, self._new(snapshot), outcome.lacks, request.roles):
            raise _failed(snapshot, failure)
        if not outcome.lacks:
            outcome.lacks = self._ask(snapshot)
        return not outcome.lacks

    def _require_not_ended(self, place: Place) -> None:
        ended, deployment = place.ended, place.deployment
        if ended is not None:
            is_ours = ended.time >= self._began_at
            if is_ours or time.monotonic() > self._began + STALE_SECONDS:
                ago = spell_seconds(time.time() - ended.time)
                found = f"the deployment in {place.run_dir} has ended, {ago} ago: {shown(ended.report, 2000)}"
                # in order, and so with 0, is not ready either
                status = ended.exit_code or ExitCode.TEMPORARY
                raise StepFailed(found, status=status, log="", fix=f"look at {place.run_dir}/logs, start it again")
        # twice: it may have ended between our looks at its word and at its process
        if place.is_orphaned and locate(self._request.run_dir, self._environ).deployment == deployment:
            raise TemporaryError(
                f"the launcher of the deployment in {place.run_dir} was killed",
                needed="a deployment whose launcher lives",
                fix=f"dynamo-mpi down --run-dir {place.run_dir}, and start it again",
            )

    def _new(self, snapshot: Snapshot) -> list[Failure]:
        """Return the failures that have come since we wait."""
        if self._known is None:
            # clocks of hosts differ: what is there at once is older, whatever it says
            at_once = time.time() - self._began_at < _AT_ONCE_SECONDS
            self._known = {(f.key, f.time) for f in snapshot.failures if at_once or f.time < self._began_at}
        return [failure for failure in snapshot.failures if (failure.key, failure.time) not in self._known]

    def _ask(self, snapshot: Snapshot) -> list[Lack]:
        """Have each model answer, and return what doesn't."""
        url = self._request.frontend or snapshot.place.frontend
        roles = self._request.roles
        if not url:
            self._say("no frontend is known: what the workers' records say has to do (--frontend URL proves it)")
            return []
        if roles and not is_whole(roles):
            self._say(f"{' and '.join(roles)} alone can't answer: what the workers' records say has to do")
            return []
        answers = self._outcome.answers
        for _, model in models_of(snapshot):
            if model in answers:
                continue
            try:
                answers[model] = _complete(url, model, min(ANSWER_SECONDS, max(1.0, self._end - time.monotonic())))
            except EngineError as error:
                return [Lack(f"a completion of {model} by {url}", shown(error.found, 500))]
        return []

    def _tell(self) -> None:
        outcome = self._outcome
        lacks = "; ".join(map(str, outcome.lacks))
        self._say(f"waiting for {lacks}; {spell_seconds(time.monotonic() - self._began)} so far")
        if (snapshot := outcome.snapshot) is not None:
            for failure in self._new(snapshot):
                if failure in snapshot.open_failures:
                    self._say(f"failed: {spell_failure(failure, snapshot.name_of(failure), time.time())}")

    def _late(self) -> BootstrapError:
        if self._trouble is not None:
            return self._trouble
        lacks = "; ".join(map(str, self._outcome.lacks))
        return DeadlineError(
            f"not ready after {self._request.timeout:g} s: {lacks}",
            fix="a longer --timeout where it only takes longer; dynamo-mpi status shows more",
        )


def _complete(url: str, model: str, seconds: float) -> Answer:
    """Ask for a completion.

    Raises:
        EngineError: there is none (yet).
    """
    from dynamo_mpi.local.ask import NotServedYet, ask

    parts = urlsplit(url if "://" in url else f"http://{url}")

    def complete() -> Answer:
        return ask(
            parts.port or 80,
            model,
            QUESTION,
            max_tokens=ANSWER_TOKENS,
            timeout_seconds=seconds,
            interruptible=lambda connection: contextlib.nullcontext(),
            host=parts.hostname or "",
        )

    try:
        return within(seconds, complete, "completion")
    except NotServedYet as error:
        raise EngineError(f"it serves no completion yet: {error}") from None
    except TimeoutError:
        raise EngineError(f"no answer in {seconds:.0f} s") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise EngineError("something else than a frontend answers there") from None


def _failed(snapshot: Snapshot, failure: Failure) -> StepFailed:
    text = spell_failure(failure, snapshot.name_of(failure), time.time())
    log = failure.report or ""
    return StepFailed(
        f"it can't become ready: {text}", status=failure.exit_code, log=log, fix="mend it, start it again"
    )
