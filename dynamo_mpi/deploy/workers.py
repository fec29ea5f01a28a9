# SPDX-License-Identifier: Apache-2.0
"""The workers of a deployment: starts them side by side, polls them, starts one again, in place or elsewhere, while the others run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.deploy.blame import Evidence, blame
from dynamo_mpi.deploy.check_results import require_container
from dynamo_mpi.deploy.first_death import first_death
from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare, Stop
from dynamo_mpi.deploy.reports import (
    Beginning,
    Report,
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

    from dynamo_mpi.deploy.failures import FailureHandler
    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.recovery import Action
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command

# rank 0's last log line in an orderly end
GOODBYE = "exit: done"
# a step that has lost a node, or of which a report exists, ends by itself, or is cancelled, and at last its launcher is killed
LINGER_SECONDS, KILL_SECONDS = 5.0, 10.0


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
    def probe(self, node: str) -> Command | None: ...
    def prepare(self, node: str) -> Sequence[Command]: ...


class _Ending(NamedTuple):
    """A worker's end, until it is decided what follows.

    Args:
        step: the step, which has ended.
        code: its exit code.
        report: the launcher's own report; None if the ranks have reported.
    """

    step: Step
    code: int
    report: Report | None


class WorkerSet:
    """All workers of one deployment.

    Args:
        failures: where the workers are, and what follows a failure.
        builder: builds their commands.
        step_controller: ends the remains of a step.
        run_dir: the deployment's folder.
        say: prints one line.
    """

    def __init__(
        self,
        failures: FailureHandler,
        builder: CommandBuilder,
        step_controller: StepController,
        run_dir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self._failures, self._builder = failures, builder
        self._step_controller, self._run_dir, self._say = step_controller, run_dir, say
        self._environment: Mapping[str, str] = {}
        self._clients: Mapping[str, str] = {}
        self._running: dict[str, Step] = {}
        self._starts: dict[str, Beginning] = {}
        self._count: dict[str, int] = {}
        self._pauses: dict[str, float] = {}
        self._ready: dict[str, float] = {}
        self._endings: dict[str, _Ending] = {}
        self._doomed: dict[str, float] = {}
        self.departed: dict[str, float] = {}
        """Workers that ended with 0 on request and aren't restarted, with the time of their end in seconds since 1970."""
        self.given_up: dict[str, str] = {}
        """Workers that can't be started again while others of their role serve, with the reason."""

    def start(self, environment: Mapping[str, str], services: Mapping[str, str]) -> None:
        """Start all of them.

        Args:
            environment: their environment.
            services: addresses and credentials of the services, for this process's own requests to etcd.
        """
        self._environment, self._clients = environment, {**environment, **services}
        for worker in self._failures.workers:
            self._start(worker)

    @property
    def pending(self) -> list[str]:
        """Names of the workers that must become ready and aren't yet."""
        return [worker.name for worker in self._failures.workers if self._is_pending(worker.name)]

    @property
    def all_serve(self) -> bool:
        """Whether every worker runs and is ready."""
        names = [worker.name for worker in self._failures.workers if worker.name not in self.given_up]
        return all(name in self._running and name in self._ready for name in names)

    @property
    def ended(self) -> bool:
        """Whether no worker runs or will be restarted."""
        return not self._pauses and not self._running and not self._endings

    @property
    def changes(self) -> int:
        """Grows whenever a worker's place or state changes for good."""
        return sum(self._count.values()) + len(self.departed) + len(self.given_up)

    def steps_of(self, role: str) -> list[Step]:
        """Return the running steps of a role."""
        names = [worker.name for worker in self._failures.workers if worker.role == role]
        return [self._running[name] for name in names if name in self._running]

    def deregister(self, role: str) -> None:
        """Deregister the workers of a role that had to be cancelled, because workers of other roles may still drain."""
        for step in self.steps_of(role):
            if step.child.exit_code() not in (None, ExitCode.OK):
                self._deregister(step.name, step.command)

    def poll(self) -> None:
        """Report workers that have become ready, and answer the failures of others.

        Raises:
            StepFailed: a worker failed that can't be restarted.
        """
        for worker in self._failures.workers:
            self._poll_worker(worker)

    def _start(self, worker: Worker) -> None:
        ready_file = self._run_dir.ready_file(worker.name)
        self._run_dir.remove_ready_file(worker.name)
        self._ready.pop(worker.name, None)
        command = self._builder.worker(worker)
        if worker.name in self._count:
            # if only srun was killed, its ranks may have registered before they were cancelled
            self._deregister(worker.name, command)
        self._count[worker.name] = count = self._count.get(worker.name, 0) + 1
        attempt = starts_before(self._environment) + count
        environment = {**self._environment, ATTEMPT: str(attempt), **own_files(worker.name, self._environment)}
        failures = self._run_dir.failures(worker.name)
        self._starts[worker.name] = Beginning.of(worker, command, {**environment, **command.environment}, failures)
        self._running[worker.name] = start(command, environment, self._run_dir.log(worker.name), ready_file)
        self._say(f"{worker.name}: {worker.ranks} rank{'s' if worker.ranks > 1 else ''} on {','.join(worker.nodes)}")

    def _poll_worker(self, worker: Worker) -> None:
        name, step = worker.name, self._running.get(worker.name)
        if step is None:
            self._settle(worker)
            if time.monotonic() >= self._pauses.get(name, float("inf")):
                del self._pauses[name]
                self._start(next(each for each in self._failures.workers if each.name == name))
            return
        if name not in self._ready and self._run_dir.is_ready(name):
            self._ready[name] = time.monotonic()
            self._say(f"{name}: ready")
        code = step.child.exit_code()
        if code is None:
            self._end_rest(worker, step)
        else:
            del self._running[name]
            lost = self._failures.lost_nodes(worker) if self._doomed.pop(name, None) is not None else {}
            self._ended(worker, step, ExitCode.TEMPORARY if lost else code)

    def _end_rest(self, worker: Worker, step: Step) -> None:
        """End a step of which a node is lost: its launcher may wait for that node for minutes."""
        name, now = worker.name, time.monotonic()
        if name in self._doomed:
            if now > self._doomed[name]:
                step.child.kill()
        elif lost := self._failures.lost_nodes(worker):
            listed = ", ".join(f"{node} is lost: {why}" for node, why in lost.items())
            self._say(f"{name}: {listed}")
            self._step_controller.cancel([step])
            self._doomed[name] = now + LINGER_SECONDS

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
        death = first_death(output)
        evidence = Evidence(
            code,
            worker.nodes,
            beginning.reports(),
            None if death is None else death.placed(worker.nodes, worker.ranks_per_node),
            trace.phase or ("serve" if worker.name in self._ready else ""),
            tuple(self._failures.lost_nodes(worker)),
        )
        served = time.monotonic() - self._ready[worker.name] if worker.name in self._ready else 0.0
        self._endings[worker.name] = _Ending(step, code, report)
        self._failures.failed(worker, blame(evidence), served, self._environment)
        self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        """Do what follows a failure, if that is decided by now."""
        others = [
            other.name
            for other in self._failures.workers
            if other.role == worker.role and other.name != worker.name and self._lives(other.name)
        ]
        action = self._failures.due(worker, others)
        if action is None:
            return
        step, code, report = self._endings.pop(worker.name)
        if isinstance(action, Stop):
            raise _failed(worker.name, action, _Ending(step, code, report))
        if report is not None:
            self._say(str(report))
        if isinstance(action, Degrade):
            self.given_up[worker.name] = action.reason
            self._say(
                f"warning: {worker.name}: ended with exit code {code}, and isn't started again: {action.reason}; "
                f"{', '.join(others)} of its role still serve"
            )
            return
        self._pauses[worker.name] = time.monotonic() + action.seconds
        self._say(f"{worker.name}: ended with exit code {code}; {self._next(worker.name, action)}")

    def _next(self, name: str, action: Action) -> str:
        """Describe a worker's next start."""
        assert not isinstance(action, (Degrade, Stop))  # noqa: S101 - `_settle` has seen to it
        when = f"in {action.seconds:g} s" if action.seconds else "at once"
        words = []
        if isinstance(action, MoveToSpare):
            words = [
                f"{node} is left out ({action.reasons[node]}), {spare} takes its place" for node, spare in action.moves
            ]
            if action.is_forced:
                return "; ".join([*words, f"start {self._count[name] + 1} {when}"])
        restarts, most = self._failures.restarts(name), self._failures.max_restarts
        return "; ".join([*words, f"start {restarts + 1} of at most {most + 1} in an hour, {when}"])

    def _lives(self, name: str) -> bool:
        return name in self._running or name in self._pauses or name in self._endings

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
        return name in self._pauses or name in self._endings or (name in self._running and name not in self._ready)


def _failed(name: str, action: Stop, ending: _Ending) -> StepFailed:
    """Return the error with which the deployment ends."""
    found, needed, fix = ending.report or (f"{name} ended with exit code {ending.code}", "", "")
    if action.reason:
        found = f"{found}; {action.reason}"
    return StepFailed(found, status=action.code, log=ending.step.last_words(), expected=needed, fix=fix)
