# SPDX-License-Identifier: Apache-2.0
"""What is known of the worker as a whole, as metrics and facts: for the answers to probes and for the metrics file."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.trace_context import trace_of
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
from dynamo_mpi.mpi.restart_count import restart_count
from dynamo_mpi.telemetry.health_state import HealthState, world_metrics
from dynamo_mpi.telemetry.metrics import render
from dynamo_mpi.telemetry.world_metrics import WorldNumbers, describe_progress, metrics_of_world

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.finding import Severity
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.progress import ProgressTracker
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.metrics import Metric


class WorldStatus(WorkerHook):
    """Collects it.

    Args:
        context: rank 0's.
        settings: the worker's.

    Attributes:
        facts: what the worker is.
        severities: of the preflight's findings.
        tracker: of the ranks, once they are watched.
    """

    def __init__(self, context: RankContext, settings: Settings) -> None:
        self._phases, self._host = context.phases, context.log.host
        self.facts = facts_of(settings, os.environ)
        self.severities: Sequence[Severity] = ()
        self.tracker: ProgressTracker | None = None
        self._failures: tuple[Failure, ...] = ()
        self._exit_code: int | None = None
        self._in_flight: int | None = None
        self._is_ready = False

    def on_ready(self) -> None:
        """Count the worker as ready."""
        self._is_ready = True

    def on_requests_in_flight(self, count: int) -> None:
        """Note how many requests are in flight."""
        self._in_flight = count

    def on_failure(self, failure: WorldFailure) -> None:
        """Note what the world ends of."""
        self._failures = (*self._failures, *failure.failures)
        self._exit_code = failure.first.exit_code

    def on_exit(self, code: int) -> None:
        """Note the exit code."""
        self._exit_code = code

    def numbers(self) -> dict[str, str]:
        """Return what changes, as `HealthState` of the process that answers probes takes it."""
        progress = "" if self.tracker is None else describe_progress(self.tracker.progress())
        return {"progress": progress, "metrics": render(self._of_ranks())}

    def as_metrics_file(self) -> str:
        """Return all metrics, as the metrics file has them."""
        now, wall, age = time.monotonic(), time.time(), self._phases.age
        began = self._phases.spans[-1].began if self._phases.spans else 0.0
        state = HealthState(
            rank=0,
            host=self._host,
            pid=os.getpid(),
            born=wall - age,
            began=now - age,
            attempt=restart_count(os.environ),
            phase=self._phases.current,
            since=wall - age + began,
            facts=tuple(self.facts.items()),
        )
        is_ready = self._is_ready and state.phase == "serve" and not self._failures
        step = ".".join(filter(None, (os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID"))))
        # beside the files of other workers of this node, which the collector reads as one
        common = {
            "dynamo_namespace": self.facts["namespace"],
            "dynamo_component": self.facts["component"],
            "worker": os.environ.get(LAUNCH_VARIABLE) or step,
        }
        return render((*world_metrics(state, ready=is_ready), *self._of_ranks()), common)

    def _of_ranks(self) -> tuple[Metric, ...]:
        if self.tracker is None:
            return ()
        numbers = WorldNumbers(
            self.tracker.ranks(),
            self.tracker.progress(),
            self.severities,
            self._failures,
            self._exit_code,
            self._in_flight,
        )
        return metrics_of_world(numbers)


class HealthPublisher(WorkerHook):
    """Has the process that answers probes know of the world.

    Args:
        reporter: to that process.
        status: what is known.
    """

    def __init__(self, reporter: HealthClient, status: WorldStatus) -> None:
        self._reporter, self._status = reporter, status
        reporter.send_facts(status.facts)

    def collect(self) -> None:
        """Have the numbers be told from now on: the ranks are watched."""
        self._reporter.collect_by(self._status.numbers)

    def assign_runtime_port(self, settings: Settings) -> None:
        """Give the Dynamo runtime, which reads its environment, a port beside ours.

        Raises:
            UsageError: there is none.
        """
        from dynamo_mpi.telemetry.health_address import PORT_VARIABLE
        from dynamo_mpi.telemetry.runtime_port import runtime_port

        port = runtime_port(self._reporter.address, settings.runtime_system_port)
        os.environ[PORT_VARIABLE] = str(port)
        self._reporter.send("runtime", str(port))

    def on_failure_detected(self) -> None:
        """Answer at once that the world ends."""
        self._reporter.send_failure()

    def on_failure(self, failure: WorldFailure) -> None:
        """Answer why."""
        self._reporter.send_failure(failure.report)


def facts_of(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker is, by the names of probes' answers and of metrics' labels."""
    namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
    facts = {
        "role": settings.role,
        "engine": settings.engine,
        "model": settings.served_model_name,
        "namespace": namespace,
        "component": component,
        "endpoint": settings.endpoint,
    }
    trace = trace_of(environ)
    return facts if trace is None else {**facts, "trace": trace.parent}
