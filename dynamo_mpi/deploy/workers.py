# SPDX-License-Identifier: Apache-2.0
"""The workers of a deployment: starts them side by side, polls them, starts one again, in place or elsewhere, while the others run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.deploy.check_results import require_container
from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare, Stop
from dynamo_mpi.deploy.reports import Beginning, Report, revoke_registrations
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.step_commands import own_files
from dynamo_mpi.deploy.steps import REST_SECONDS, Step, StepController, StepEnd, start
from dynamo_mpi.deploy.timeline import keep_failed_start
from dynamo_mpi.deploy.worker_ends import WorkerEnd, is_disorderly, seconds_left
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.launcher import ATTEMPT_VARIABLE as ATTEMPT
from dynamo_mpi.mpi.launcher import starts_before

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.deploy.blame import Blame
    from dynamo_mpi.deploy.failures import FailureHandler
    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.recovery import Action
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command, CommandBuilder
    from dynamo_mpi.deploy.timeline import Milestones


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
        milestones: gets the time from each failure until the worker serves again.
    """

    def __init__(
        self,
        failures: FailureHandler,
        builder: CommandBuilder,
        step_controller: StepController,
        run_dir: RunDir,
        say: Callable[[str], None],
        milestones: Milestones | None = None,
    ) -> None:
        self._failures, self._builder, self._milestones = failures, builder, milestones
        self._step_controller, self._run_dir, self._say = step_controller, run_dir, say
        self._environment: Mapping[str, str] = {}
        self._clients: Mapping[str, str] = {}
        self._running: dict[str, Step] = {}
        self._starts: dict[str, Beginning] = {}
        self._count: dict[str, int] = {}
        self._pauses: dict[str, float] = {}
        self._ready: dict[str, float] = {}
        self._endings: dict[str, _Ending] = {}
        self._ends: dict[str, StepEnd] = {}
        self._deadlines: dict[str, float] = {}
        self._failed_at: dict[str, float] = {}
        self._found: dict[str, Blame] = {}
        self._planned: dict[str, tuple[MoveToSpare | Degrade, float]] = {}
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
    def is_deciding(self) -> bool:
        """Whether it is about to be decided what follows a failure."""
        return bool(self._endings or self._ends)

    def lives(self, name: str) -> bool:
        """Return whether a worker runs, or will again."""
        return name in self._running or name in self._pauses or name in self._endings

    def serves(self, name: str) -> bool:
        """Return whether a worker is ready, and isn't about to drain."""
        return name in self._running and name in self._ready and name not in self._planned

    def plan(self, worker: Worker, action: MoveToSpare | Degrade, seconds: float) -> None:
        """Drain a worker, and do something as soon as it has ended.

        Args:
            worker: the worker.
            action: what follows.
            seconds: the time that it has to drain.
        """
        self._planned[worker.name] = (action, time.monotonic() + seconds)
        if (step := self._running.get(worker.name)) is not None:
            self._step_controller.signal([step])

    def why_not_drained(self, name: str) -> str:
        """Return why a worker can't be asked to drain; empty if it can, or doesn't run."""
        step = self._running.get(name)
        return "" if step is None else self._step_controller.why_not_drained(step)

    def is_planned(self, name: str) -> bool:
        """Return whether a worker drains because of `plan`."""
        return name in self._planned

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
            before = self._run_dir.timeline(worker.name, self._count[worker.name])
            keep_failed_start(self._run_dir.timeline(worker.name), before, self._found.pop(worker.name, None))
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
            if name in self._planned and name in self._pauses:
                self._act(worker, self._planned.pop(name)[0])
            if time.monotonic() >= self._pauses.get(name, float("inf")):
                del self._pauses[name]
                self._start(next(each for each in self._failures.workers if each.name == name))
            return
        if name not in self._ready and self._run_dir.is_ready(name):
            self._ready[name] = time.monotonic()
            self._say(f"{name}: ready")
            if name in self._failed_at and self._milestones is not None:
                self._milestones.add(f"{name} recovery", self._failed_at.pop(name))
        code = step.child.exit_code()
        if code is None:
            self._end_rest(worker, step)
            return
        del self._running[name]
        self._deadlines.pop(name, None)
        if self._ends.pop(name, None) is not None:
            reported = next((each.code for each in self._starts[name].reports() if each.is_composed), code)
            code = ExitCode.TEMPORARY if self._failures.lost_nodes(worker) else reported
        self._ended(worker, step, code)

    def _end_rest(self, worker: Worker, step: Step) -> None:
        """End what is left of a step whose launcher may wait for a lost node, or for ranks that don't end."""
        name, now = worker.name, time.monotonic()
        if name in self._ends:
            self._ends[name].poll()
            return
        allowed = seconds_left(step, self._starts[name], may_hang=self._failures.may_hang)
        self._deadlines[name] = min(self._deadlines.get(name, float("inf")), now + allowed)
        lost = {**self._starts[name].lost_hosts(), **self._failures.lost_nodes(worker)}
        if lost and self._failures.may_hang:
            why = ", ".join(f"{node} is lost ({reason})" for node, reason in lost.items())
        elif name in self._planned and now > self._planned[name][1]:
            why = "it hasn't drained in time"
        elif now >= self._deadlines[name]:
            why = "its ranks have failed, and its launcher still runs"
        else:
            return
        self._say(f"{name}: {why}: ending what is left of its step")
        self._ends[name] = StepEnd(step, self._step_controller, 0.0 if lost else REST_SECONDS)

    def _ended(self, worker: Worker, step: Step, code: int) -> None:
        step.child.kill()  # the remaining processes of a killed launcher on this host
        if worker.name in self._planned:
            self._deregister(worker.name, step.command)
            self._step_controller.cancel([step])
            self._say(f"{worker.name}: ended with {code}, as requested")
            self._failed_at[worker.name] = time.time()
            self._act(worker, self._planned.pop(worker.name)[0])
            return
        if code == ExitCode.OK and is_disorderly(worker.name, step, self._run_dir):
            self._say(
                f"{worker.name}: its launcher ended with 0, but its ranks did not end in order: a host may be lost"
            )
            code = ExitCode.TEMPORARY
        if code == ExitCode.OK:
            self.departed[worker.name] = time.time()
            self._say(f"{worker.name}: ended with 0 on request; it isn't restarted")
            return
        require_container(worker.name, step.child.output(), worker.nodes, worker.ranks_per_node)

        def clear() -> None:
            self._deregister(worker.name, step.command)
            self._step_controller.cancel([step])  # if only srun was killed, its ranks still run

        self._failed_at[worker.name] = time.time()
        ready = self._ready.get(worker.name)
        lost = self._failures.lost_nodes(worker)
        end = WorkerEnd(step, code, self._starts[worker.name], lost, was_ready=ready is not None)
        self._found[worker.name], report = end.examine(self._clients, clear, self._say)
        self._endings[worker.name] = _Ending(step, code, report)
        served = 0.0 if ready is None else time.monotonic() - ready
        self._failures.failed(worker, self._found[worker.name], served, self._environment)
        self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        """Do what follows a failure, if that is decided by now."""
        others = [
            other.name
            for other in self._failures.workers
            if other.role == worker.role and other.name != worker.name and self.lives(other.name)
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
        if isinstance(action, MoveToSpare) and worker.role != "agg":
            self._say(f"{worker.name}: the KV check isn't repeated with {', '.join(dict(action.moves).values())}")

    def _act(self, worker: Worker, action: MoveToSpare | Degrade) -> None:
        """Do what was planned for the worker's end."""
        if isinstance(action, Degrade):
            self._pauses.pop(worker.name, None)
            self.given_up[worker.name] = action.reason
            self._failures.leave_out(action.reasons, worker.name)
            return
        self._failures.move(worker, action)
        self._pauses[worker.name] = time.monotonic()

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
    needed = needed or "a worker that starts and serves"
    fix = fix or f"correct the cause in the log, {ending.step.child.log}, and start it again"
    return StepFailed(found, status=action.code, log=ending.step.last_words(), expected=needed, fix=fix)
