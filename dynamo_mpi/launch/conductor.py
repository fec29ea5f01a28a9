# SPDX-License-Identifier: Apache-2.0
"""A deployment's life: check, services, workers side by side, watch, end. It ends exactly what it started."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.launch.srun import without_srun_input
from dynamo_mpi.launch.steps import Step, start
from dynamo_mpi.services.interrupts import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_mpi.launch.command import Command
    from dynamo_mpi.launch.deployment import Worker
    from dynamo_mpi.launch.run_dir import RunDir
    from dynamo_mpi.launch.settings import LaunchSettings
    from dynamo_mpi.launch.steps import Endings
    from dynamo_mpi.services.interrupts import Interrupts

POLL_SECONDS = 0.5
FIRST_NEWS_SECONDS, LONGEST_NEWS_SECONDS = 15.0, 300.0
LISTED_SECONDS = 30.0
SERVICES_STOP_SECONDS = 20.0
CANCEL_SECONDS = 15.0
# what a further start doesn't mend
MISTAKES = frozenset(
    {ExitCode.USAGE, ExitCode.DATA, ExitCode.NO_MODEL, ExitCode.NOT_AUTHORISED, ExitCode.ILLEGAL_LAYOUT}
)


class StepFailed(BootstrapError):
    """A step ended, and the deployment with it.

    Args:
        found: which, and how.
        status: its exit code, or ours where it gave none.
        log: the end of its own words.
    """

    def __init__(self, found: str, *, status: int, log: str, fix: str = "") -> None:
        super().__init__(found, fix=fix)
        self.status, self.log = status, log


class _AskedToStop(Exception):
    """`dynamo-mpi down` wants an end."""


class Renderer(Protocol):
    """Says how each step is started."""

    def check(self) -> Command: ...
    def services(self) -> Command: ...
    def worker(self, worker: Worker, services: Iterable[str] = ...) -> Command: ...


class Conductor:
    """Runs one deployment. Use it from the main thread.

    Args:
        settings: what was asked for.
        workers: what runs where.
        renderer: how steps are started.
        endings: how they are ended.
        run_dir: the deployment's folder.
        interrupts: looked at wherever we wait.
        say: takes one line.
    """

    def __init__(
        self,
        settings: LaunchSettings,
        workers: Sequence[Worker],
        renderer: Renderer,
        endings: Endings,
        run_dir: RunDir,
        interrupts: Interrupts,
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._workers, self._renderer, self._endings = settings, workers, renderer, endings
        self._run_dir, self._interrupts, self._tell = run_dir, interrupts, say
        self._began = time.monotonic()
        self._environment = without_srun_input(os.environ)
        self._services: Step | None = None
        self._running: dict[str, Step] = {}
        self._restarts: dict[str, int] = {}
        self._ready: set[str] = set()
        self._url = ""
        self._service_variables: tuple[str, ...] = ()

    def run(self) -> int:
        """Live it.

        Returns:
            The exit code: 0 when it was asked to end, or all workers have.

        Raises:
            StepFailed: a step ended that shouldn't have.
            Interrupted: the user wants an end.
        """
        try:
            self._describe()
            if not self._settings.skip_check:
                self._check()
            self._start_services()
            for worker in self._workers:
                self._start_worker(worker)
            self._watch()
        except _AskedToStop as end:
            self._say(str(end))
        except Interrupted as end:
            if end.number != signal.SIGUSR1:
                raise
            self._say("the time is nearly up (SIGUSR1): ending")
        finally:
            self._stop()
        return ExitCode.OK

    def _check(self) -> None:
        step = self._start(self._renderer.check())
        while (code := step.child.exit_code()) is None:
            self._pause()
        self._running.pop(step.name)
        if code:
            raise StepFailed(
                f"the check refused the deployment with exit code {code}; nothing was launched",
                status=code,
                log=_tail(step, 200),
            )
        self._say("check: passed")

    def _start_services(self) -> None:
        self._services = step = self._start(self._renderer.services())
        deadline = time.monotonic() + self._settings.start_timeout
        news = _News()
        while (content := self._run_dir.services()) is None:
            self._require_services()
            if time.monotonic() > deadline:
                raise StepFailed(
                    f"the services don't answer after {self._settings.start_timeout:g} s",
                    status=ExitCode.DEADLINE,
                    log=_tail(step),
                    fix="a longer --start-timeout where the image's import takes long",
                )
            if seconds := news.due():
                self._say(f"waiting for the services, {seconds:.0f} s")
            self._pause()
        variables = {str(name): str(value) for name, value in content.get("environment", {}).items()}
        self._environment |= variables
        self._service_variables = tuple(variables)
        self._url = str(content.get("url", ""))
        self._say(f"services on {content.get('host')}: etcd, NATS, frontend at {self._url}")

    def _start_worker(self, worker: Worker) -> None:
        ready_file = self._run_dir.ready_file(worker.name)
        ready_file.unlink(missing_ok=True)
        self._ready.discard(worker.name)
        command = self._renderer.worker(worker, self._service_variables)
        step = start(command, self._environment, self._run_dir.log(worker.name), ready_file)
        self._running[worker.name] = step
        self._say(f"{worker.name}: {worker.ranks} rank{'s' if worker.ranks > 1 else ''} on {','.join(worker.nodes)}")

    def _start(self, command: Command) -> Step:
        step = start(command, self._environment, self._run_dir.log(command.name))
        self._running[command.name] = step
        return step

    def _watch(self) -> None:
        """Return when the last worker has ended by itself."""
        self._describe()
        told, news = False, _News()
        while True:
            self._require_services()
            for worker in self._workers:
                self._look_at(worker)
            if not any(worker.name in self._running for worker in self._workers):
                self._say("all workers have ended")
                return
            waiting = [name for name in self._running if name != "services" and name not in self._ready]
            if not waiting and not told:
                told = True
                self._announce()
            if waiting and (seconds := news.due()):
                self._say(f"waiting for {', '.join(waiting)}, {seconds:.0f} s; logs in {self._run_dir.logs}")
            self._pause()

    def _pause(self) -> None:
        if self._run_dir.is_to_stop():
            raise _AskedToStop("asked to stop")
        self._interrupts.pause(POLL_SECONDS)

    def _look_at(self, worker: Worker) -> None:
        step = self._running.get(worker.name)
        if step is None:
            return
        if worker.name not in self._ready and self._run_dir.is_ready(worker.name):
            self._ready.add(worker.name)
            self._say(f"{worker.name}: ready")
        code = step.child.exit_code()
        if code is None:
            return
        del self._running[worker.name]
        if code != ExitCode.OK:
            self._endings.cancel([step])  # where srun alone was killed, its ranks still run
        restarts = self._restarts.get(worker.name, 0)
        if code == ExitCode.OK:
            self._say(f"{worker.name}: ended with 0; whoever drained it starts it again, or ends the deployment")
        elif code in MISTAKES or restarts >= self._settings.max_restarts:
            raise StepFailed(f"{worker.name} ended with exit code {code}", status=code, log=_tail(step))
        else:
            self._restarts[worker.name] = restarts + 1
            self._say(
                f"{worker.name}: ended with exit code {code}; start {restarts + 2} of at most "
                f"{self._settings.max_restarts + 1}"
            )
            self._start_worker(worker)

    def _require_services(self) -> None:
        step = self._services
        code = step.child.exit_code() if step is not None else None
        if step is not None and code is not None:
            raise StepFailed(
                f"the services ended with exit code {code}", status=code or ExitCode.UNAVAILABLE, log=_tail(step)
            )

    def _announce(self) -> None:
        """Say that it serves, once the frontend lists the model; it hears of workers a moment later than we."""
        name = self._settings.served_model_name
        end = time.monotonic() + LISTED_SECONDS
        models = _models(self._url)
        while models is not None and not models and time.monotonic() < end:
            self._require_services()
            self._pause()
            models = _models(self._url)
        if models is None:
            self._say(f"ready, as its workers say; the frontend {self._url} can't be reached from this host")
        elif not models:
            self._say(f"warning: all workers are ready, but {self._url} lists no model after {LISTED_SECONDS:g} s")
        else:
            body = json.dumps({"model": name or models[0], "messages": [{"role": "user", "content": "Hello!"}]})
            self._say(
                f"ready: {', '.join(models)}. Try:\ncurl {self._url}/v1/chat/completions "
                f"-H 'Content-Type: application/json' -d '{body}'"
            )

    def _describe(self) -> None:
        self._run_dir.describe(
            {
                "schema": 1,
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "job_id": os.environ.get("SLURM_JOB_ID", ""),
                "url": self._url,
                "model": self._settings.served_model_name or self._settings.model,
                "workers": [
                    {
                        "name": w.name,
                        "role": w.role,
                        "nodes": w.nodes,
                        "ranks": w.ranks,
                        "step": self._renderer.worker(w).step,
                    }
                    for w in self._workers
                ],
            }
        )

    def _stop(self) -> None:
        """End everything: first who takes requests, then who works for them, the services last."""
        signals_before = self._interrupts.count
        if self._services is not None and self._services.child.exit_code():
            self._endings.ask([self._services])  # where srun alone was killed, its step still runs
        for role in ("decode", "agg", "prefill"):
            names = [worker.name for worker in self._workers if worker.role == role]
            self._end(
                [self._running[name] for name in names if name in self._running],
                self._settings.stop_timeout,
                signals_before,
            )
        rest = list(self._running.values())
        if self._interrupts.count != signals_before:
            # once more below: then they end at once, and their keys don't stay on the node as after a cancelling
            self._endings.ask(rest)
        self._end(rest, SERVICES_STOP_SECONDS, self._interrupts.count)
        if self._services is not None and self._services.child.exit_code():
            self._endings.cancel([self._services])

    def _end(self, steps: list[Step], seconds: float, signals_before: int) -> None:
        living = [step for step in steps if step.child.exit_code() is None]
        if living and self._interrupts.count == signals_before:
            self._say(f"ending {', '.join(step.name for step in living)}")
            self._endings.ask(living)
            self._await_end(living, seconds, signals_before)
        if living := [step for step in living if step.child.exit_code() is None]:
            self._say(f"cancelling {', '.join(step.name for step in living)}")
            self._endings.cancel(living)
            self._await_end(living, CANCEL_SECONDS, None)
        for step in steps:
            step.child.kill()
            self._running.pop(step.name, None)

    def _await_end(self, steps: list[Step], seconds: float, signals_before: int | None) -> None:
        end = time.monotonic() + seconds
        while any(step.child.exit_code() is None for step in steps) and time.monotonic() < end:
            if signals_before is not None and self._interrupts.count != signals_before:
                return
            self._interrupts.sleep(POLL_SECONDS)

    def _say(self, text: str) -> None:
        self._tell(f"{time.monotonic() - self._began:6.1f} s  {text}")


class _News:
    """When to say that we still wait: now and then, more and more rarely."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._period = FIRST_NEWS_SECONDS
        self._next = self._began + self._period

    def due(self) -> float:
        """Return the seconds since the start when it is time for a word, else 0."""
        now = time.monotonic()
        if now < self._next:
            return 0.0
        self._period = min(2 * self._period, LONGEST_NEWS_SECONDS)
        self._next = now + self._period
        return now - self._began


def _tail(step: Step, lines: int = 40) -> str:
    return "\n".join(step.child.last_lines(lines))


def _models(url: str) -> list[str] | None:
    """Return the models that a frontend lists; None where it doesn't answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request("GET", "/v1/models")
        content = json.loads(connection.getresponse().read())
        return [str(model["id"]) for model in content["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()
