# SPDX-License-Identifier: Apache-2.0
"""The workers of a deployment: starts them side by side, polls them, restarts one while the others run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.deploy.check_results import require_container
from dynamo_mpi.deploy.first_death import first_death
from dynamo_mpi.deploy.reports import (
    MISTAKES,
    Beginning,
    Trace,
    is_reported,
    report_death,
    revoke_registrations,
    trace_in_etcd,
)
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.steps import Step, StepController, start
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.launcher import ATTEMPT_VARIABLE as ATTEMPT
from dynamo_mpi.mpi.launcher import starts_before

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command

# rank 0's last log line in an orderly end
GOODBYE = "exit: done"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


def own_files(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables with file names of a worker's own, if all workers have the same ones: they would overwrite each other's. Pure."""
    files = {}
    if folder := environ.get("DYN_MPI_LOG_DIR"):
        files["DYN_MPI_LOG_DIR"] = f"{folder}/{name}"
    if metrics := environ.get("DYN_MPI_METRICS_FILE"):
        files["DYN_MPI_METRICS_FILE"] = f"{metrics.removesuffix('.prom')}-{name}.prom"
    return files


class CommandBuilder(Protocol):
    """Builds the command of each step."""

    @property
    def checks_in_services(self) -> bool: ...
    def check(self) -> Command: ...
    def kv_check(self, workers: Sequence[Worker]) -> Command: ...
    def services(self) -> Command: ...
    def worker(self, worker: Worker) -> Command: ...


class WorkerSet:
    """All workers of one deployment.

    Args:
        workers: the workers and their nodes.
        max_restarts: how often each may be restarted.
        builder: builds their commands.
        step_controller: ends the remains of a step.
        run_dir: the deployment's folder.
        say: prints one line.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        max_restarts: int,
        builder: CommandBuilder,
        step_controller: StepController,
        run_dir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self._workers, self._max_restarts, self._builder = workers, max_restarts, builder
        self._step_controller, self._run_dir, self._say = step_controller, run_dir, say
        self._environment: Mapping[str, str] = {}
        self._clients: Mapping[str, str] = {}
        self._running: dict[str, Step] = {}
        self._starts: dict[str, Beginning] = {}
        self._restarts: dict[str, int] = {}
        self._pauses: dict[str, float] = {}
        self._ready: set[str] = set()
        self.departed: dict[str, float] = {}
        """Workers that ended with 0 on request and aren't restarted, with the time of their end in seconds since 1970."""

    def start(self, environment: Mapping[str, str], services: Mapping[str, str]) -> None:
        """Start all of them.

        Args:
            environment: their environment.
            services: addresses and credentials of the services, for this process's own requests to etcd.
        """
        self._environment, self._clients = environment, {**environment, **services}
        for worker in self._workers:
            self._start(worker)

    @property
    def pending(self) -> list[str]:
        """Names of the workers that must become ready and aren't yet."""
        return [worker.name for worker in self._workers if self._is_pending(worker.name)]

    @property
    def all_serve(self) -> bool:
        """Whether every worker runs and is ready."""
        return all(worker.name in self._running and worker.name in self._ready for worker in self._workers)

    @property
    def ended(self) -> bool:
        """Whether no worker runs or will be restarted."""
        return not self._pauses and not self._running

    def steps_of(self, role: str) -> list[Step]:
        """Return the running steps of a role."""
        names = [worker.name for worker in self._workers if worker.role == role]
        return [self._running[name] for name in names if name in self._running]

    def deregister(self, role: str) -> None:
        """Deregister the workers of a role that had to be cancelled, because workers of other roles may still drain."""
        for step in self.steps_of(role):
            if step.child.exit_code() not in (None, ExitCode.OK):
                self._deregister(step.name, step.command)

    def poll(self) -> None:
        """Report workers that have become ready, and restart those that have failed.

        Raises:
            StepFailed: a worker failed that can't be restarted.
        """
        for worker in self._workers:
            self._poll_worker(worker)

    def _start(self, worker: Worker) -> None:
        ready_file = self._run_dir.ready_file(worker.name)
        self._run_dir.remove_ready_file(worker.name)
        self._ready.discard(worker.name)
        command = self._builder.worker(worker)
        if worker.name in self._restarts:
            # if only srun was killed, its ranks may have registered before they were cancelled
            self._deregister(worker.name, command)
        attempt = starts_before(self._environment) + self._restarts.get(worker.name, 0) + 1
        environment = {**self._environment, ATTEMPT: str(attempt), **own_files(worker.name, self._environment)}
        failures = self._run_dir.failures(worker.name)
        self._starts[worker.name] = Beginning.of(worker, command, {**environment, **command.environment}, failures)
        self._running[worker.name] = start(command, environment, self._run_dir.log(worker.name), ready_file)
        self._say(f"{worker.name}: {worker.ranks} rank{'s' if worker.ranks > 1 else ''} on {','.join(worker.nodes)}")

    def _poll_worker(self, worker: Worker) -> None:
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
        step.child.kill()  # the remaining processes of a killed launcher on this host
        if code == ExitCode.OK and self._is_disorderly(worker, step):
            self._say(
                f"{worker.name}: its launcher ended with 0, but its ranks did not end in order: a host may be lost"
            )
            code = ExitCode.TEMPORARY
        if code == ExitCode.OK:
            self.departed[worker.name] = time.time()
            self._say(f"{worker.name}: ended with 0 on request; it isn't restarted")
            return
        output = step.child.output()
        require_container(worker.name, output, worker.nodes, worker.ranks_per_node)
        beginning, report = self._starts[worker.name], None
        is_printed = is_reported(code, output)
        is_known = is_printed or beginning.has_files
        if not is_printed and (written := beginning.written()):
            self._say(f"{worker.name}: {written}")
        trace = Trace() if is_known else trace_in_etcd(beginning, self._clients)
        self._deregister(worker.name, step.command)
        self._step_controller.cancel([step])  # if only srun was killed, its ranks still run
        if not is_known:
            report = report_death(beginning, step, code, trace, self._clients)
        restarts = self._restarts.get(worker.name, 0)
        if code in MISTAKES or restarts >= self._max_restarts:
            found, needed, fix = report or (f"{worker.name} ended with exit code {code}", "", "")
            raise StepFailed(found, status=code, log=step.last_words(), expected=needed, fix=fix)
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
        """Return whether exit code 0 hides a failure: Open MPI 5's mpirun has no other code for a lost host. A worker that ends in order
        removes its ready file, and rank 0 logs its last line."""
        if GOODBYE in step.last_words(200):
            return False
        return self._run_dir.is_ready(worker.name) or first_death(step.child.output()) is not None

    def _deregister(self, name: str, command: Command) -> None:
        """Revoke the registrations of a step whose processes have all ended."""
        launch = command.environment.get(LAUNCH_VARIABLE)
        if launch is None:
            return
        try:
            if revoke_registrations(launch, self._clients):
                self._say(f"{name}: was still registered; it is deregistered now")
        except DynamoMpiError as error:
            if name in self._ready:
                self._say(
                    f"warning: {name} may stay registered until its lease ends, and requests to it fail until then: "
                    f"etcd can't be reached from this host ({error.problem})"
                )

    def _is_pending(self, name: str) -> bool:
        return name in self._pauses or (name in self._running and name not in self._ready)
