# SPDX-License-Identifier: Apache-2.0
"""The workers of a deployment: starts them side by side, polls them, starts one again, in place or elsewhere, while the others run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.deploy.check_results import require_container
from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare, Stop
from dynamo_mpi.deploy.reports import Beginning, revoke_registrations
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.step_commands import own_files
from dynamo_mpi.deploy.steps import REST_SECONDS, Step, StepController, StepEnd, start
from dynamo_mpi.deploy.timeline import keep_failed_start
from dynamo_mpi.deploy.worker_ends import WorkerEnd, is_disorderly, last_silence, seconds_left
from dynamo_mpi.deploy.worker_state import Ending, WorkerState
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.launcher import ATTEMPT_VARIABLE as ATTEMPT
from dynamo_mpi.mpi.launcher import starts_before

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.deploy.failures import FailureHandler
    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.recovery import Action
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.step_commands import Command, CommandBuilder
    from dynamo_mpi.deploy.timeline import Milestones


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
        self._states = {worker.name: WorkerState() for worker in failures.workers}
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
        return [name for name, state in self._states.items() if state.is_pending]

    @property
    def all_serve(self) -> bool:
        """Whether every worker runs and is ready."""
        return all(state.serves for name, state in self._states.items() if name not in self.given_up)

    @property
    def ended(self) -> bool:
        """Whether no worker runs or will be restarted."""
        return not any(state.lives for state in self._states.values())

    @property
    def is_deciding(self) -> bool:
        """Whether it is about to be decided what follows a failure."""
        return any(state.ending is not None or state.remains is not None for state in self._states.values())

    def lives(self, name: str) -> bool:
        """Return whether a worker runs, or will again."""
        return self._states[name].lives

    def serves(self, name: str) -> bool:
        """Return whether a worker is ready, and isn't about to drain."""
        return self._states[name].serves and not self.is_planned(name)

    def plan(self, worker: Worker, action: MoveToSpare | Degrade, seconds: float) -> None:
        """Drain a worker, and do something as soon as it has ended.

        Args:
            worker: the worker.
            action: what follows.
            seconds: the time that it has to drain.
        """
        state = self._states[worker.name]
        state.planned = action, time.monotonic() + seconds
        if state.step is not None:
            self._step_controller.signal([state.step])

    def why_not_drained(self, name: str) -> str:
        """Return why a worker can't be asked to drain; empty if it can, or doesn't run."""
        step = self._states[name].step
        return "" if step is None else self._step_controller.why_not_drained(step)

    def is_planned(self, name: str) -> bool:
        """Return whether a worker drains because of `plan`."""
        return self._states[name].planned is not None

    def steps_of(self, role: str) -> list[Step]:
        """Return the running steps of a role."""
        states = [self._states[worker.name] for worker in self._failures.workers if worker.role == role]
        return [state.step for state in states if state.step is not None]

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
        name, before = worker.name, self._states[worker.name]
        ready_file = self._run_dir.ready_file(name)
        self._run_dir.remove_ready_file(name)
        before.ready = None
        command = self._builder.worker(worker)
        if before.count:
            # if only srun was killed, its ranks may have registered before they were cancelled
            self._deregister(name, command)
            kept = self._run_dir.timeline(name, before.count)
            keep_failed_start(self._run_dir.timeline(name), kept, before.found)
        count = before.count + 1
        attempt = starts_before(self._environment) + count
        environment = {**self._environment, ATTEMPT: str(attempt), **own_files(name, self._environment)}
        beginning = Beginning.of(worker, command, {**environment, **command.environment}, self._run_dir.failures(name))
        step = start(command, environment, self._run_dir.log(name), ready_file)
        self._states[name] = WorkerState(count, step, beginning, failed_at=before.failed_at)
        self._say(f"{name}: {worker.ranks} rank{'s' if worker.ranks > 1 else ''} on {','.join(worker.nodes)}")

    def _poll_worker(self, worker: Worker) -> None:
        name, state = worker.name, self._states[worker.name]
        if state.step is not None:
            self._poll_step(worker, state, state.step)
        if state.step is None:
            self._settle(worker, state)
            if state.planned is not None and state.next_start is not None:
                self._act(worker, state, state.planned[0])
            if state.next_start is not None and time.monotonic() >= state.next_start:
                # with the nodes that it has by now
                self._start(next(each for each in self._failures.workers if each.name == name))

    def _poll_step(self, worker: Worker, state: WorkerState, step: Step) -> None:
        name = worker.name
        if state.ready is None and self._run_dir.is_ready(name):
            state.ready = time.monotonic()
            self._say(f"{name}: ready")
            if state.failed_at is not None and self._milestones is not None:
                self._milestones.add(f"{name} recovery", state.failed_at)
            state.failed_at = None
        code = step.child.exit_code()
        if code is None:
            self._end_rest(worker, state, step)
            return
        state.step = None
        if state.remains is not None:
            reported = next((each.code for each in state.beginning_of_step.reports() if each.is_composed), code)
            code = ExitCode.TEMPORARY if self._failures.lost_nodes(worker) else reported
            state.remains = None
        self._ended(worker, state, step, code)

    def _end_rest(self, worker: Worker, state: WorkerState, step: Step) -> None:
        """End what is left of a step whose launcher may wait for a lost node, or for ranks that don't end."""
        now, beginning = time.monotonic(), state.beginning_of_step
        if state.remains is not None:
            state.remains.poll()
            return
        if (silence := last_silence(step)) != state.silence:
            state.silence = silence
            self._failures.prober.hurry()
        state.deadline = min(state.deadline, now + seconds_left(step, beginning, may_hang=self._failures.may_hang))
        lost = {**beginning.lost_hosts(), **self._failures.lost_nodes(worker)}
        if lost and self._failures.may_hang:
            why = ", ".join(f"{node} is lost ({reason})" for node, reason in lost.items())
        elif state.planned is not None and now > state.planned[1]:
            why = "it hasn't drained in time"
        elif now >= state.deadline:
            why = "its ranks have failed, and its launcher still runs"
        else:
            return
        self._say(f"{worker.name}: {why}: ending what is left of its step")
        state.remains = StepEnd(step, self._step_controller, 0.0 if lost else REST_SECONDS)

    def _ended(self, worker: Worker, state: WorkerState, step: Step, code: int) -> None:
        name, beginning = worker.name, state.beginning_of_step
        step.child.kill()  # the remaining processes of a killed launcher on this host
        if state.planned is not None:
            self._deregister(name, step.command)
            self._step_controller.cancel([step])
            self._say(f"{name}: ended with {code}, as requested")
            state.failed_at = time.time()
            self._act(worker, state, state.planned[0])
            return
        if code == ExitCode.OK and is_disorderly(name, step, self._run_dir):
            self._say(f"{name}: its launcher ended with 0, but its ranks did not end in order: a host may be lost")
            code = ExitCode.TEMPORARY
        if code == ExitCode.OK:
            self.departed[name] = time.time()
            self._say(f"{name}: ended with 0 on request; it isn't restarted")
            return
        require_container(name, step.child.output(), worker.nodes, worker.ranks_per_node)

        def clear() -> None:
            self._deregister(name, step.command)
            self._step_controller.cancel([step])  # if only srun was killed, its ranks still run

        state.failed_at = time.time()
        lost = self._failures.lost_nodes(worker)
        end = WorkerEnd(step, code, beginning, lost, was_ready=state.ready is not None)
        state.found, report = end.examine(self._clients, clear, self._say)
        state.ending = Ending(step, code, report)
        served = 0.0 if state.ready is None else time.monotonic() - state.ready
        self._failures.failed(worker, state.found, served, self._environment)

    def _settle(self, worker: Worker, state: WorkerState) -> None:
        """Do what follows a failure, if that is decided by now."""
        name = worker.name
        others = [
            other.name
            for other in self._failures.workers
            if other.role == worker.role and other.name != name and self.lives(other.name)
        ]
        action = self._failures.due(worker, others)
        if action is None:
            return
        ending, state.ending = state.ending, None
        assert ending is not None  # noqa: S101 - only a worker that has ended has failed
        if isinstance(action, Stop):
            raise _failed(name, action, ending)
        if ending.report is not None:
            self._say(str(ending.report))
        if isinstance(action, Degrade):
            self.given_up[name] = action.reason
            self._say(
                f"warning: {name}: ended with exit code {ending.code}, and isn't started again: {action.reason}; "
                f"{', '.join(others)} of its role still serve"
            )
            return
        state.next_start = time.monotonic() + action.seconds
        self._say(f"{name}: ended with exit code {ending.code}; {self._next(name, action)}")
        if isinstance(action, MoveToSpare) and worker.role != "agg":
            self._say(f"{name}: the KV check isn't repeated with {', '.join(dict(action.moves).values())}")

    def _act(self, worker: Worker, state: WorkerState, action: MoveToSpare | Degrade) -> None:
        """Do what was planned for the worker's end."""
        state.planned = None
        if isinstance(action, Degrade):
            state.next_start = None
            self.given_up[worker.name] = action.reason
            self._failures.leave_out(action.reasons, worker.name)
            return
        self._failures.move(worker, action)
        state.next_start = time.monotonic()

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
                return "; ".join([*words, f"start {self._states[name].count + 1} {when}"])
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
            if self._states[name].ready is not None:
                self._say(
                    f"warning: {name} may stay registered until its lease ends, and requests to it fail until then: "
                    f"etcd can't be reached from this host ({error.problem})"
                )


def _failed(name: str, action: Stop, ending: Ending) -> StepFailed:
    """Return the error with which the deployment ends."""
    found, needed, fix = ending.report or (f"{name} ended with exit code {ending.code}", "", "")
    if action.reason:
        found = f"{found}; {action.reason}"
    needed = needed or "a worker that starts and serves"
    fix = fix or f"correct the cause in the log, {ending.step.child.log}, and start it again"
    return StepFailed(found, status=action.code, log=ending.step.last_words(), expected=needed, fix=fix)
