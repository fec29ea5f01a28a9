# SPDX-License-Identifier: Apache-2.0
"""Runs a deployment: check, services, workers side by side, watch, end. It ends only what it has started."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamo_mpi.common.credentials import split_clients
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.process import DRAIN_SIGNALS
from dynamo_mpi.common.signals import Interrupted, Interrupts
from dynamo_mpi.common.waiting import ReminderSchedule
from dynamo_mpi.deploy.description import DeploymentDescription
from dynamo_mpi.deploy.excluded import describe_excluded
from dynamo_mpi.deploy.failures import FailureHandler
from dynamo_mpi.deploy.first_steps import REMINDER_SECONDS, FirstSteps
from dynamo_mpi.deploy.launchers import without_srun_input
from dynamo_mpi.deploy.node_inquiry import NodeProber
from dynamo_mpi.deploy.replacements import Replacements
from dynamo_mpi.deploy.services import StepFailed, curl_line, listed_models
from dynamo_mpi.deploy.spares import SparePool
from dynamo_mpi.deploy.step_commands import needs_kv_check
from dynamo_mpi.deploy.step_ender import StepEnder
from dynamo_mpi.deploy.timeline import Milestones
from dynamo_mpi.deploy.workers import WorkerSet
from dynamo_mpi.mpi.job_time_limit import JobTimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.deploy.excluded import ExcludedNode
    from dynamo_mpi.deploy.node_watch import NodeWatch
    from dynamo_mpi.deploy.nodes import Placement
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.settings import LaunchSettings
    from dynamo_mpi.deploy.step_commands import CommandBuilder
    from dynamo_mpi.deploy.steps import StepController

POLL_SECONDS = 0.5
# after a failure, or a sign of one
HURRY_SECONDS = 0.1
LISTED_SECONDS = 30.0
# a busy frontend may not answer at once; one that this host can't reach never will
REACHED_SECONDS = 10.0
# longer than the sum of the head node's own limits for its services
SERVICES_STOP_SECONDS = 25.0
# additional time of an end, besides the workers' drains
END_SECONDS = 100.0


class _AskedToStop(Exception):
    """`dynamo-mpi down`, or the end of the job's time, requests the end."""


@dataclass(frozen=True)
class LaunchContext:
    """What a deployment's launcher works with.

    Args:
        run_dir: the deployment's folder.
        interrupts: checked in every wait.
        say: prints one line of progress.
        environ: the steps' base environment.
        watch: watches the nodes; None where nothing but a worker's end shows that one is lost.
        excluded: nodes that an earlier start of the job has left out.
    """

    run_dir: RunDir
    interrupts: Interrupts
    say: Callable[[str], None]
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    watch: NodeWatch | None = None
    excluded: Sequence[ExcludedNode] = ()


class DeploymentController:
    """Runs one deployment. Use it from the main thread.

    Args:
        settings: the deployment's settings.
        placement: the workers and their nodes, and the spares.
        builder: builds the command lines of the steps.
        step_controller: ends the steps.
        context: its folder, interrupts, output and environment.
    """

    def __init__(
        self,
        settings: LaunchSettings,
        placement: Placement,
        builder: CommandBuilder,
        step_controller: StepController,
        context: LaunchContext,
    ) -> None:
        self._settings, self._placement, self._builder = settings, placement, builder
        self._step_controller = step_controller
        self._run_dir, self._interrupts, self._print_line = context.run_dir, context.interrupts, context.say
        self._began = time.monotonic()
        # the services' file has all of these for the ranks
        self._environment, _ = split_clients(without_srun_input(context.environ))
        self._first = FirstSteps(builder, self._environment, self._run_dir, self._pause, self._say)
        self._node_watch = context.watch
        prober = NodeProber(builder, step_controller, self._run_dir, context.watch)
        self._spares = SparePool(
            placement.spares, builder, step_controller, self._run_dir, self._spare_failed, len(placement.workers)
        )
        self._failures = FailureHandler(
            placement, settings.max_restarts, self._spares, prober, self._run_dir, context.excluded
        )
        self._url = ""
        self._described: Mapping[str, object] = {}
        self._limit = JobTimeLimit.of(context.environ)
        self._milestones = Milestones(self._run_dir.milestones, "launch")
        self._worker_steps = WorkerSet(
            self._failures, builder, step_controller, self._run_dir, self._say, self._milestones
        )
        self._description = DeploymentDescription(settings, builder, self._failures, self._worker_steps)
        self._replacements = Replacements(
            self._failures, self._worker_steps, self._run_dir, self._say, settings.stop_timeout
        )

    def run(self) -> int:
        """Run the deployment until its end.

        Returns:
            The exit code: 0 if the end was requested, the job's time is nearly up, or all workers have ended.

        Raises:
            StepFailed: a step ended unexpectedly.
            Interrupted: the user requests the end.
        """
        try:
            self._describe()
            self._require_time()
            if not self._settings.skip_check:
                with self._milestones.step("check"):
                    self._first.check()
            if needs_kv_check(self._settings, self._placement.workers):
                with self._milestones.step("kv check"):
                    self._first.check_kv(self._placement.workers, is_needed=self._settings.kv_check != "warn")
            with self._milestones.step("services"):
                services = self._first.start_services(self._settings.start_timeout, self._require_services)
            self._url = services.url
            if self._node_watch is not None:
                self._node_watch.start()
            self._worker_steps.start(self._environment, services.environment)
            self._spares.start(self._environment)
            self._watch()
        except _AskedToStop as end:
            self._say(str(end))
        except Interrupted as end:
            if end.number not in DRAIN_SIGNALS:
                raise
            self._say(f"the time is nearly up ({signal.Signals(end.number).name}): ending")
        finally:
            self._stop()
        return ExitCode.OK

    def _watch(self) -> None:
        """Return when the last worker has ended by itself."""
        self._describe()
        announced, reminders = False, ReminderSchedule(*REMINDER_SECONDS)
        while True:
            self._poll()
            if self._worker_steps.ended:
                self._require_none_lost()
                self._say("all workers have ended")
                return
            waiting = self._worker_steps.pending
            if not waiting and not announced:
                announced = self._announce()
                continue
            if not waiting:
                # a worker that has failed is waited for from then on
                reminders = ReminderSchedule(*REMINDER_SECONDS)
            elif seconds := reminders.due():
                self._say(f"waiting for {', '.join(waiting)}, {seconds:.0f} s; logs in {self._run_dir.logs}")
            self._pause()

    def _poll(self) -> None:
        """Look at everything that runs, and describe what has changed."""
        self._require_services()
        self._worker_steps.poll()
        self._spares.poll()
        self._replacements.poll()
        for line in self._failures.look_at_nodes():
            self._say(f"warning: {line}")
        self._describe()

    def _require_none_lost(self) -> None:
        """Check that all workers ended on request."""
        for name, reason in self._worker_steps.given_up.items():
            raise StepFailed(
                f"{name} could not be started again: {reason}",
                status=ExitCode.TEMPORARY,
                log="",
                expected="every worker serves until it is asked to end",
                fix="start the deployment again",
            )

    @property
    def _end_seconds(self) -> float:
        """Time limit of an orderly end: the roles end one after the other."""
        return len(self._settings.worker_roles) * self._settings.stop_timeout + END_SECONDS

    def _require_time(self) -> None:
        """If the job's time limit is too close for an orderly end from the start, warn and ignore it."""
        now = time.time()
        if self._limit is not None and self._limit.pause(self._end_seconds, now) is None:
            self._say(f"warning: {self._limit.too_late(self._end_seconds, now)}")
            self._limit = None

    def _pause(self) -> None:
        if self._run_dir.stop_requested():
            raise _AskedToStop("asked to stop")
        if self._limit is not None and self._limit.pause(self._end_seconds, now := time.time()) is None:
            raise _AskedToStop(self._limit.due(now))
        is_hurried = self._worker_steps.is_deciding or self._failures.prober.is_hurried
        self._interrupts.pause(HURRY_SECONDS if is_hurried else POLL_SECONDS)

    def _require_services(self) -> None:
        if why := self._failures.lost_head:
            self._failures.leave_out({self._placement.head: why})
            found = f"the head node {self._placement.head} is lost, with etcd, NATS and the frontend: {why}"
            needed, fix = "a head node that answers", "start the deployment again"
            raise StepFailed(found, status=ExitCode.TEMPORARY, log="", expected=needed, fix=fix)
        self._first.require_services()

    def _announce(self) -> bool:
        """Print that the deployment serves, when the frontend lists the model; it discovers workers a moment after their ready files.

        Returns:
            Whether there is nothing more to print: False if a worker has to become ready again.
        """
        name = self._settings.served_model_name
        if not self._url:
            self._say("ready, according to its workers; a frontend needs the addresses in services.json")
            return True
        began = time.monotonic()
        models = listed_models(self._url)
        while not models and time.monotonic() < began + (REACHED_SECONDS if models is None else LISTED_SECONDS):
            self._poll()
            if not self._worker_steps.all_serve:
                return not self._worker_steps.pending
            self._pause()
            models = listed_models(self._url)
        if models is None:
            self._say(f"ready, according to its workers; the frontend {self._url} can't be reached from this host")
        elif not models:
            self._say(f"warning: all workers are ready, but {self._url} lists no model after {LISTED_SECONDS:g} s")
        else:
            self._say(f"ready: {', '.join(map(sanitize, models))}. Try:\n{curl_line(self._url, name or models[0])}")
        return True

    def _describe(self) -> None:
        """Write what runs, if that has changed."""
        now = {**self._description.content(self._url), "replacements": self._replacements.describe()}
        if now != self._described:
            self._described = now
            self._run_dir.describe(now)

    def _spare_failed(self, node: str, reason: str) -> None:
        self._failures.leave_out({node: reason})
        self._say(f"warning: the spare node {node} is left out: {reason}")

    def _stop(self) -> None:
        """End everything: prefill, whose KV decode still fetches while it drains, then decode, the services last."""
        ender = StepEnder(self._step_controller, self._interrupts, self._say)
        if self._node_watch is not None:
            self._node_watch.close()
        self._failures.close()
        if self._first.services is not None and self._first.services.child.exit_code():
            self._step_controller.signal([self._first.services])  # if only srun was killed, its step still runs
        for role in ("prefill", "decode", "agg"):
            # without etcd no worker can drain
            drain = 0.0 if self._failures.lost_head else self._settings.stop_timeout
            ender.end(self._worker_steps.steps_of(role), drain)
            if not ender.is_hurried:
                self._worker_steps.deregister(role)
        self._spares.close()
        rest = list(self._first.running.values())
        if ender.is_hurried:
            # a second request, below, ends them at once; cancelling would leave their keys on the node
            self._step_controller.signal(rest)
        ender.end(rest, 0.0 if self._failures.lost_head else SERVICES_STOP_SECONDS, is_last=True)
        if self._first.services is not None and self._first.services.child.exit_code():
            self._step_controller.cancel([self._first.services])
        if line := describe_excluded(self._failures.excluded, self._settings.hostfile):
            self._say(line)

    def _say(self, text: str) -> None:
        self._print_line(f"{time.monotonic() - self._began:6.1f} s  {text}")
