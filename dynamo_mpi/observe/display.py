# SPDX-License-Identifier: Apache-2.0
"""What rank 0 shows of the world to those who watch it: answers to probes, a metrics file, a supervisor's notifications.

Each of them only where it is asked for.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.records import LAUNCH_VARIABLE
from dynamo_mpi.health.state import State, world_metrics
from dynamo_mpi.launchers.attempt import attempt_of
from dynamo_mpi.observe.metrics import render
from dynamo_mpi.observe.trace import PARENT_VARIABLE, STATE_VARIABLE, describe_trouble, trace_of
from dynamo_mpi.observe.world_metrics import WorldNumbers, describe_progress, metrics_of_world

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.health.reporter import Reporter
    from dynamo_mpi.observe.metrics import Metric
    from dynamo_mpi.observe.metrics_file import MetricsFile
    from dynamo_mpi.parallelism.finding import Severity
    from dynamo_mpi.preflight.verdict import Verdict
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision.failure import Failure
    from dynamo_mpi.supervision.guard import Guard
    from dynamo_mpi.supervision.notify import Notifier
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import Voice

# beyond the drain itself: the deregistration, the engine's last step, the ranks' parting
_END_SECONDS = 60.0


class Display:
    """Shows it.

    Args:
        phases: rank 0's, which are the world's.
        voice: how rank 0 speaks.
        reporter: to the process that answers probes, if there is one.
        notifier: to a supervisor, if there is one.

    Attributes:
        in_flight: requests that are being answered; None where it isn't known.
    """

    def __init__(self, phases: Phases, voice: Voice, reporter: Reporter | None, notifier: Notifier | None) -> None:
        self._phases, self._voice = phases, voice
        self._reporter, self._notifier = reporter, notifier
        self._file: MetricsFile | None = None
        self._facts: dict[str, str] = {}
        self._guard: Guard | None = None
        self._severities: tuple[Severity, ...] = ()
        self._failures: tuple[Failure, ...] = ()
        self._exit_code: int | None = None
        self._serves = False
        self.in_flight: int | None = None

    @property
    def system_url(self) -> str | None:
        """Where probes are answered; None where they aren't."""
        if self._reporter is None:
            return None
        from dynamo_mpi.health.runtime_port import url_of

        return url_of(self._reporter.address)

    def know(self, settings: Settings) -> None:
        """Show what the worker is."""
        namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
        self._facts = {
            "role": settings.role,
            "engine": settings.engine,
            "model": settings.served_model_name,
            "namespace": namespace,
            "component": component,
            "endpoint": settings.endpoint,
        }
        if trouble := describe_trouble(os.environ):
            self._voice.say(f"warning: {trouble}")
            # whatever reads it next would have to find the same
            for name in (PARENT_VARIABLE, STATE_VARIABLE):
                os.environ.pop(name, None)
        if (trace := trace_of(os.environ)) is not None:
            self._facts["trace"] = trace.parent
        if self._reporter is not None:
            self._reporter.tell_facts(self._facts)
        if self._notifier is not None:
            self._notifier.seconds |= {
                "load": settings.load_timeout,
                "prove": settings.prove_timeout,
                "drain": settings.drain_timeout + _END_SECONDS,
            }
        if settings.metrics_file is not None:
            from dynamo_mpi.observe.metrics_file import MetricsFile

            self._file = MetricsFile(settings.metrics_file, self._file_text, self._voice.say)
            self._phases.listen(self._file.renew)

    def point_runtime(self, settings: Settings) -> None:
        """Give the Dynamo runtime, which reads its environment, a port beside ours.

        Raises:
            UsageError: there is none.
        """
        if self._reporter is None:
            return
        from dynamo_mpi.health.address import PORT_VARIABLE
        from dynamo_mpi.health.runtime_port import runtime_port

        port = runtime_port(self._reporter.address, settings.runtime_system_port)
        os.environ[PORT_VARIABLE] = str(port)
        self._reporter.tell("runtime", str(port))

    def judged(self, verdict: Verdict) -> None:
        """Show what the preflight has found."""
        self._severities = tuple(finding.severity for finding in verdict.findings)

    def watch(self, guard: Guard) -> None:
        """Show how the ranks are, from the verdict on."""
        self._guard = guard
        guard.on_failures(self._failed)
        if self._reporter is not None:
            guard.at_once(self._reporter.tell_end)
            self._reporter.collect_by(self._numbers)

    def ready(self) -> None:
        """Show that requests are answered."""
        self._serves = True
        if self._notifier is not None:
            self._notifier.tell_ready(f"{self._facts['model']} at {self._facts['endpoint']}")

    def refused(self, text: str) -> None:
        """Show why the world ends, before anybody guards it."""
        if self._notifier is not None:
            self._notifier.tell_failure(text)

    def ended(self, code: int) -> None:
        """Show that this was the end."""
        self._exit_code = code
        if self._file is not None:
            self._file.end()

    def _failed(self, failures: Sequence[Failure], text: str) -> None:
        self._failures = (*self._failures, *failures)
        if self._reporter is not None:
            self._reporter.tell_end(text)
        if self._notifier is not None:
            self._notifier.tell_failure(text)
        self.ended(failures[0].exit_code)

    def _numbers(self) -> dict[str, str]:
        progress = "" if self._guard is None else describe_progress(self._guard.roll.progress())
        return {"progress": progress, "metrics": render(self._of_ranks())}

    def _of_ranks(self) -> tuple[Metric, ...]:
        if self._guard is None:
            return ()
        roll = self._guard.roll
        numbers = WorldNumbers(
            roll.ranks(), roll.progress(), self._severities, self._failures, self._exit_code, self.in_flight
        )
        return metrics_of_world(numbers)

    def _file_text(self) -> str:
        now, wall, age = time.monotonic(), time.time(), self._phases.age
        began = self._phases.spans[-1].began if self._phases.spans else 0.0
        state = State(
            rank=0,
            host=self._voice.host,
            pid=os.getpid(),
            born=wall - age,
            began=now - age,
            attempt=attempt_of(os.environ),
            phase=self._phases.current,
            since=wall - age + began,
            facts=tuple(self._facts.items()),
        )
        is_ready = self._serves and state.phase == "serve" and not self._failures
        step = ".".join(filter(None, (os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID"))))
        # beside the files of other workers of this node, which the collector reads as one
        common = {
            "dynamo_namespace": self._facts["namespace"],
            "dynamo_component": self._facts["component"],
            "worker": os.environ.get(LAUNCH_VARIABLE) or step,
        }
        return render((*world_metrics(state, ready=is_ready), *self._of_ranks()), common)
