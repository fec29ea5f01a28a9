# SPDX-License-Identifier: Apache-2.0
"""Waits until a deployment is ready and has answered, can no longer become ready, or the time limit is reached."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import (
    AuthorizationError,
    DiscoveryError,
    DynamoMpiError,
    EngineError,
    ExitCode,
    LayoutError,
    PhaseTimeoutError,
    RetryableError,
)
from dynamo_mpi.common.waiting import ReminderSchedule, call_with_timeout
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.ops.deployment import DamagedServicesError, Deployment, LauncherKilledError, find_deployment
from dynamo_mpi.ops.readiness import (
    DEPARTED,
    MissingItem,
    format_failure,
    format_seconds,
    is_complete,
    missing_items,
    models_of,
    unlike_items,
    unrecoverable_failure,
)
from dynamo_mpi.ops.run_dirs import NoRunDirError
from dynamo_mpi.ops.status import ETCD_SECONDS, DeploymentStatus, read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.deploy.local.ask import Answer
    from dynamo_mpi.discovery.failure_records import StoredFailure

POLL_SECONDS = 1.0
REMINDER_SECONDS = (5.0, 120.0)
# a deployment that ended before the wait may be restarted soon in the same folder
_AT_ONCE_SECONDS = 2.0
STALE_SECONDS = 10.0
# between the end of a deployment and the start of the next, a folder may have no valid credentials; and a file system may fail for a moment
REFUSALS = 3
QUESTION, ANSWER_TOKENS, ANSWER_SECONDS = "Say hello.", 8, 60.0


@dataclass(frozen=True)
class WaitRequest:
    """The conditions of the wait.

    Args:
        run_dir: the deployment's folder; None to find one.
        namespace: only workers of this namespace.
        model: only workers of this model.
        roles: roles that must serve; empty for all that are needed.
        frontend: URL for the completion; empty for the run folder's.
        timeout: time limit in seconds.
    """

    run_dir: Path | None
    namespace: str | None
    model: str | None
    roles: tuple[str, ...]
    frontend: str
    timeout: float


@dataclass
class WaitResult:
    """The result of the wait.

    Args:
        seconds: its duration.
        status: the last status.
        missing: what wasn't ready.
        answers: the completions, by model.
        error: why it isn't ready; None if it is.
        exit_code: the command's exit code.
    """

    seconds: float = 0.0
    status: DeploymentStatus | None = None
    missing: list[MissingItem] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    error: DynamoMpiError | None = None
    exit_code: int = ExitCode.OK


class ReadinessWaiter:
    """Waits for one deployment.

    Args:
        request: the conditions.
        environ: this process's environment.
        log: prints one line.
    """

    def __init__(self, request: WaitRequest, environ: Mapping[str, str], log: Callable[[str], None]) -> None:
        self._request, self._environ, self._log = request, environ, log
        self._began, self._began_at = time.monotonic(), time.time()
        self._end = self._began + request.timeout
        self._known: set[tuple[str, float]] | None = None
        self._refusals, self._was_launched = 0, False
        self._problem: DynamoMpiError | None = None
        self._outcome = WaitResult()

    def run(self) -> WaitResult:
        """Wait.

        Raises:
            UsageError: several deployments could be meant, or the settings for etcd can't be used.
        """
        outcome, reminders = self._outcome, ReminderSchedule(*REMINDER_SECONDS)
        try:
            while not self._is_ready():
                if time.monotonic() >= self._end:
                    raise self._late()
                if reminders.due():
                    self._log_missing()
                time.sleep(max(0.0, min(POLL_SECONDS, self._end - time.monotonic())))
        except StepFailed as error:
            outcome.error, outcome.exit_code = error, error.status
        except (
            AuthorizationError,
            DamagedServicesError,
            DiscoveryError,
            LayoutError,
            NoRunDirError,
            PhaseTimeoutError,
            RetryableError,
        ) as error:
            outcome.error, outcome.exit_code = error, error.exit_code
        outcome.seconds = time.monotonic() - self._began
        return outcome

    def _is_ready(self) -> bool:
        request, outcome = self._request, self._outcome
        deployment = find_deployment(request.run_dir, self._environ)
        self._require_not_ended(deployment)
        self._was_launched = self._was_launched or deployment.launch is not None
        self._problem = None
        if deployment.services_problem:
            return self._refuse("services", DamagedServicesError(deployment.run_dir, deployment.services_problem))
        if deployment.environ is None:
            if deployment.launch is not None:
                outcome.missing = [MissingItem("services", "not up yet")]
            else:
                outcome.missing = [MissingItem("deployment", f"none runs in {deployment.run_dir}")]
                if deployment.is_missing:  # a launch may make it
                    self._problem = NoRunDirError(deployment.run_dir)
                    if deployment.is_foreign:  # a launch refuses it
                        raise self._problem
            return False
        try:
            seconds = min(ETCD_SECONDS, max(1.0, self._end - time.monotonic()))
            status = read_status(deployment, request.namespace, request.model, seconds)
        except DiscoveryError as error:
            self._problem = error
            outcome.missing = [MissingItem("etcd", error.problem)]
            return False
        except AuthorizationError as error:
            return self._refuse("etcd", error)
        self._refusals = 0
        outcome.status, outcome.missing = status, missing_items(status, request.roles)
        if failure := unrecoverable_failure(status, self._new(status), outcome.missing, request.roles):
            raise _failed(status, failure)
        if lost := [item for item in outcome.missing if item.position == DEPARTED]:
            raise RetryableError(
                f"it can't become ready: {', '.join(map(str, lost))}, and launch doesn't restart what ended with 0",
                expected="a worker of each role",
                fix="end the deployment (dynamo-mpi down), and start it again",
            )
        if not outcome.missing:
            outcome.missing = self._ask(status)
        return not outcome.missing

    def _refuse(self, part: str, error: DynamoMpiError) -> bool:
        """Return False; raise the error when it has come several times in a row."""
        self._refusals, self._problem = self._refusals + 1, error
        if self._refusals >= REFUSALS:
            raise error
        self._outcome.missing = [MissingItem(part, error.problem)]
        return False

    def _require_not_ended(self, deployment: Deployment) -> None:
        end, launch = deployment.end, deployment.launch
        if self._was_launched and deployment.is_missing:  # `local` removes its folder
            raise RetryableError(
                f"the deployment in {deployment.run_dir} has ended",
                expected="a running deployment",
                fix="start it again",
            )
        if end is not None:
            is_ours = end.time >= self._began_at
            if is_ours or time.monotonic() >= min(self._began + STALE_SECONDS, self._end):
                ago = format_seconds(time.time() - end.time)
                found = f"the deployment in {deployment.run_dir} has ended, {ago} ago: {sanitize(end.problem, 2000)}"
                # a deployment that ended in order, with 0, isn't ready either
                status = end.exit_code or ExitCode.TEMPORARY
                fix = f"look at {deployment.run_dir}/logs, start it again"
                raise StepFailed(found, status=status, log="", expected="a running deployment", fix=fix)
        # checked twice: it may have ended between the check of its file and that of its process
        if deployment.launcher_is_dead and find_deployment(self._request.run_dir, self._environ).launch == launch:
            raise LauncherKilledError(deployment.run_dir)

    def _new(self, status: DeploymentStatus) -> list[StoredFailure]:
        """Return the failures since the wait began."""
        if self._known is None:
            # clocks of hosts differ: records that exist at the first look are older, whatever their time
            at_once = time.time() - self._began_at < _AT_ONCE_SECONDS
            self._known = {(f.key, f.record.time) for f in status.failures if at_once or f.record.time < self._began_at}
        return [failure for failure in status.failures if (failure.key, failure.record.time) not in self._known]

    def _ask(self, status: DeploymentStatus) -> list[MissingItem]:
        """Request a completion from each model, and return those that don't answer."""
        url = self._request.frontend or status.deployment.frontend
        roles = self._request.roles
        if not url:
            self._log(
                "no frontend is known: only the workers' records are checked (--frontend URL requests a completion)"
            )
            return []
        if roles and not is_complete(roles):
            self._log(f"{' and '.join(roles)} alone can't answer: only the workers' records are checked")
            return []
        answers = self._outcome.answers
        for _, model in models_of(status):
            if model in answers:
                continue
            try:
                answers[model] = _complete(url, model, min(ANSWER_SECONDS, max(1.0, self._end - time.monotonic())))
            except EngineError as error:
                return [MissingItem(f"a completion of {model} by {url}", sanitize(error.problem, 500))]
        return []

    def _log_missing(self) -> None:
        outcome = self._outcome
        missing = "; ".join(map(str, outcome.missing))
        self._log(f"waiting for {missing}; {format_seconds(time.monotonic() - self._began)} so far")
        if (status := outcome.status) is not None:
            for failure in self._new(status):
                if failure in status.open_failures:
                    self._log(f"failed: {format_failure(failure.record, status.name_of(failure), time.time())}")

    def _late(self) -> DynamoMpiError:
        if self._problem is not None:
            return self._problem
        missing = "; ".join(map(str, self._outcome.missing))
        problem = f"not ready after {self._request.timeout:g} s: {missing}"
        status = self._outcome.status
        if status is not None and self._outcome.missing == unlike_items(status, self._request.roles):
            return LayoutError(
                problem,
                expected="workers of one model with one card, as their frontends take one for all",
                fix="end the former workers if this is a rolling change, or give all workers the same model and engine config",
            )
        return PhaseTimeoutError(
            problem,
            expected="a worker of each role that serves, and a completion",
            fix="a longer --timeout if it only takes longer; dynamo-mpi status shows more",
        )


def _complete(url: str, model: str, seconds: float) -> Answer:
    """Request a completion.

    Raises:
        EngineError: there was none (yet).
    """
    from dynamo_mpi.deploy.local.ask import NotServedYet, ask

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
        return call_with_timeout(seconds, complete, "completion")
    except NotServedYet as error:
        raise EngineError(f"it serves no completion yet: {error}") from None
    except TimeoutError:
        raise EngineError(f"no answer in {seconds:.0f} s") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise EngineError("something else than a frontend answers there") from None


def _failed(status: DeploymentStatus, failure: StoredFailure) -> StepFailed:
    text = format_failure(failure.record, status.name_of(failure), time.time())
    log = failure.record.report or ""
    return StepFailed(
        f"it can't become ready: {text}",
        status=failure.record.exit_code,
        log=log,
        expected="workers that start and serve",
        fix="correct the error, and start it again",
    )
