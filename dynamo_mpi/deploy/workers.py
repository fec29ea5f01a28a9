# SPDX-License-Identifier: Apache-2.0
"""The workers of a deployment: started side by side, looked at, started again while the others live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.deploy.first_death import first_death
from dynamo_mpi.deploy.reports import MISTAKES, Beginning, Trace, is_reported, report_death, trace_in_etcd
from dynamo_mpi.deploy.revoke_registrations import revoke_registrations
from dynamo_mpi.deploy.service_error import StepFailed
from dynamo_mpi.deploy.steps import start
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.restart_count import VARIABLE as ATTEMPT
from dynamo_mpi.mpi.restart_count import starts_before

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dynamo_mpi.deploy.command import Command
    from dynamo_mpi.deploy.deployment import Worker
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.steps import Endings, Step

# what rank 0 says last of an orderly life
GOODBYE = "exit: done"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


def own_files(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's own files where all of a deployment were given the same: they would write over each other's. Pure."""
    files = {}
    if folder := environ.get("DYN_MPI_LOG_DIR"):
        files["DYN_MPI_LOG_DIR"] = f"{folder}/{name}"
    if metrics := environ.get("DYN_MPI_METRICS_FILE"):
        files["DYN_MPI_METRICS_FILE"] = f"{metrics.removesuffix('.prom')}-{name}.prom"
    return files


class Renderer(Protocol):
    """Says how each step is started."""

    def check(self) -> Command: ...
    def kv_check(self, workers: Sequence[Worker]) -> Command: ...
    def services(self) -> Command: ...
    def worker(self, worker: Worker, services: Iterable[str] = ...) -> Command: ...


class Workers:
    """All workers of one deployment.

    Args:
        workers: what runs where.
        max_restarts: how often each is started again.
        renderer: how they are started.
        endings: how what is left of one is ended.
        run_dir: the deployment's folder.
        say: takes one line.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        max_restarts: int,
        renderer: Renderer,
        endings: Endings,
        run_dir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self._workers, self._max_restarts, self._renderer = workers, max_restarts, renderer
        self._endings, self._run_dir, self._say = endings, run_dir, say
        self._environment: Mapping[str, str] = {}
        self._services: tuple[str, ...] = ()
        self._running: dict[str, Step] = {}
        self._begun: dict[str, Beginning] = {}
        self._restarts: dict[str, int] = {}
        self._pauses: dict[str, float] = {}
        self._ready: set[str] = set()

    def start(self, environment: Mapping[str, str], services: tuple[str, ...]) -> None:
        """Start all of them.

        Args:
            environment: theirs.
            services: names of the variables in it that the services gave.
        """
        self._environment, self._services = environment, services
        for worker in self._workers:
            self._start(worker)

    @property
    def awaited(self) -> list[str]:
        """Names of those that are to serve and don't yet."""
        return [worker.name for worker in self._workers if self._is_awaited(worker.name)]

    @property
    def ended(self) -> bool:
        """Whether none runs or will be started again."""
        return not self._pauses and not self._running

    def of(self, role: str) -> list[Step]:
        """Return the steps of a role that run."""
        names = [worker.name for worker in self._workers if worker.role == role]
        return [self._running[name] for name in names if name in self._running]

    def take_out(self, role: str) -> None:
        """Take those of a role out of discovery that had to be cancelled: others may still have to drain."""
        for step in self.of(role):
            if step.child.exit_code() not in (None, ExitCode.OK):
                self._take_out(step.name, step.command)

    def look(self) -> None:
        """Tell who has become ready, and start again who has failed.

        Raises:
            StepFailed: one failed that can't be started again.
        """
        for worker in self._workers:
            self._look_at(worker)

    def _start(self, worker: Worker) -> None:
        ready_file = self._run_dir.ready_file(worker.name)
        ready_file.unlink(missing_ok=True)
        self._ready.discard(worker.name)
        command = self._renderer.worker(worker, self._services)
        if worker.name in self._restarts:
            # where srun alone was killed, its ranks may have written something before they were cancelled
            self._take_out(worker.name, command)
        attempt = starts_before(self._environment) + self._restarts.get(worker.name, 0) + 1
        environment = {**self._environment, ATTEMPT: str(attempt), **own_files(worker.name, self._environment)}
        failures = self._run_dir.failures(worker.name)
        self._begun[worker.name] = Beginning.of(worker, command, {**environment, **command.environment}, failures)
        self._running[worker.name] = start(command, environment, self._run_dir.log(worker.name), ready_file)
        self._say(f"{worker.name}: {worker.ranks} rank{'s' if worker.ranks > 1 else ''} on {','.join(worker.nodes)}")

    def _look_at(self, worker: Worker) -> None:
        step = self._running.get(worker.name)
        if step is None:
            if time.monotonic() > self._pauses.get(worker.name, float("inf")):
                del self._pauses[worker.name]
                self._start(worker)
            return
        if worker.name not in self._ready and self._run_dir.is_ready(worker.name):
            self._ready.add(worker.name)
            self._say(f"{worker.name}: ready")
        code = step.child.exit_code()
        if code is not None:
            del self._running[worker.name]
            self._ended(worker, step, code)

    def _ended(self, worker: Worker, step: Step, code: int) -> None:
        step.child.kill()  # what a launcher that was killed has left on this host
        if code == ExitCode.OK and self._is_disorderly(worker, step):
            self._say(f"{worker.name}: its launcher ended with 0, and its ranks without a word: a host may be lost")
            code = ExitCode.TEMPORARY
        if code == ExitCode.OK:
            self._say(f"{worker.name}: ended with 0, as somebody wanted; it isn't started again")
            return
        begun, report = self._begun[worker.name], None
        is_printed = is_reported(code, step.child.output())
        is_told = is_printed or begun.has_files
        if not is_printed and (written := begun.written()):
            self._say(f"{worker.name}: {written}")
        trace = Trace() if is_told else trace_in_etcd(begun, self._environment)
        self._take_out(worker.name, step.command)
        self._endings.cancel([step])  # where srun alone was killed, its ranks still run
        if not is_told:
            report = report_death(begun, step, code, trace, self._environment)
        restarts = self._restarts.get(worker.name, 0)
        if code in MISTAKES or restarts >= self._max_restarts:
            found, needed, fix = report or (f"{worker.name} ended with exit code {code}", "", "")
            raise StepFailed(found, status=code, log=step.last_words(), needed=needed, fix=fix)
        if report is not None:
            self._say(str(report))
        self._restarts[worker.name] = restarts + 1
        pause = min(FIRST_PAUSE_SECONDS * 2**restarts, LONGEST_PAUSE_SECONDS)
        self._pauses[worker.name] = time.monotonic() + pause
        self._say(
            f"{worker.name}: ended with exit code {code}; start {restarts + 2} of at most {self._max_restarts + 1} "
            f"in {pause:g} s"
        )

    def _is_disorderly(self, worker: Worker, step: Step) -> bool:
        """Tell whether a launcher's 0 is none: Open MPI 5's mpirun has no other code for a host that it has lost. A worker that ends in order
        takes its ready file away, and rank 0 says so."""
        if GOODBYE in step.last_words(200):
            return False
        return self._run_dir.is_ready(worker.name) or first_death(step.child.output()) is not None

    def _take_out(self, name: str, command: Command) -> None:
        """Take out of discovery what nobody is left for in the step."""
        launch = command.environment.get(LAUNCH_VARIABLE)
        if launch is None:
            return
        try:
            if revoke_registrations(launch, self._environment):
                self._say(f"{name}: was still registered; it is taken out of discovery")
        except DynamoMpiError as error:
            if name in self._ready:
                self._say(
                    f"warning: {name} may stay registered until its lease ends, and requests sent to it fail till then: "
                    f"etcd can't be asked from this host ({error.found})"
                )

    def _is_awaited(self, name: str) -> bool:
        return name in self._pauses or (name in self._running and name not in self._ready)
