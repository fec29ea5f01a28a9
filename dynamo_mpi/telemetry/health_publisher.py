# SPDX-License-Identifier: Apache-2.0
"""The state of the whole worker as metrics and facts: for the health endpoint and for the metrics file."""

from __future__ import annotations

import os
import time

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.mpi.launcher import restart_count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.layout.finding import Severity
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.progress import ProgressTracker
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.metrics import Metric


class WorldStatus(WorkerHook):
    """Collects the worker's state.

    Args:
        context: rank 0's context.
        settings: the worker's settings.

    Attributes:
        facts: facts about the worker.
        severities: severities of the preflight's findings.
        hardware: severities of the hardware checks' findings.
        staged: what staging the model took; None if it wasn't staged.
        caches: how the compile caches were seeded and written back; None if they were left alone.
        tracker: the ranks' progress, once they are watched.
    """

    def __init__(self, context: RankContext, settings: Settings) -> None:
        self._phases, self._host = context.phases, context.log.host
        self.facts = facts_of(settings, os.environ)
        self.severities: Sequence[Severity] = ()
        self.hardware: Sequence[Severity] = ()
        self.staged: dict[str, Any] | None = None
        self.caches: dict[str, Any] | None = None
        self.tracker: ProgressTracker | None = None
        self._failures: tuple[Failure, ...] = ()
        self._exit_code: int | None = None
        self._in_flight: int | None = None
        self._is_ready = False

    def on_staged(self, figures: dict[str, Any]) -> None:
        """Note what staging took."""
        self.staged = figures

    def on_caches(self, figures: dict[str, Any]) -> None:
        """Note what became of the compile caches."""
        self.caches = figures

    def on_ready(self) -> None:
        """Count the worker as ready."""
        self._is_ready = True

    def on_requests_in_flight(self, count: int) -> None:
        """Set the number of requests in flight."""
        self._in_flight = count

    def on_failure(self, failure: WorldFailure) -> None:
        """Record the failure."""
        self._failures = (*self._failures, *failure.failures)
        self._exit_code = failure.first.exit_code

    def on_exit(self, code: int) -> None:
        """Record the exit code."""
        self._exit_code = code

    def numbers(self) -> dict[str, str]:
        """Return the values that change, by the words of `health_state.note`."""
        from dynamo_mpi.telemetry.metrics import describe_progress, render

        progress = "" if self.tracker is None else describe_progress(self.tracker.progress())
        return {"progress": progress, "metrics": render(self._of_ranks())}

    def as_metrics_file(self) -> str:
        """Return all metrics, in the format of the metrics file."""
        from dynamo_mpi.discovery.records import LAUNCH_VARIABLE
        from dynamo_mpi.telemetry.health_state import HealthState, world_metrics
        from dynamo_mpi.telemetry.metrics import render

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
        # the collector merges this file with those of other workers on this node
        common = {
            "dynamo_namespace": self.facts["namespace"],
            "dynamo_component": self.facts["component"],
            "worker": os.environ.get(LAUNCH_VARIABLE) or step,
        }
        return render((*world_metrics(state, ready=is_ready), *self._of_ranks()), common)

    def _of_ranks(self) -> tuple[Metric, ...]:
        if self.tracker is None:
            return ()
        from dynamo_mpi.telemetry.metrics import WorldNumbers, metrics_of_world

        numbers = WorldNumbers(
            self.tracker.ranks(),
            self.tracker.progress(),
            self.severities,
            self._failures,
            self._exit_code,
            self._in_flight,
            self.hardware,
            self.staged,
            self.caches,
        )
        return metrics_of_world(numbers)


class HealthPublisher(WorkerHook):
    """Sends the world's state to the node agent, which answers health requests.

    Args:
        client: sends it.
        status: the world's state.
    """

    def __init__(self, client: HealthClient, status: WorldStatus) -> None:
        self._client, self._status = client, status
        client.send_facts(status.facts)

    def collect(self) -> None:
        """Start to send the numbers, now that the ranks are watched."""
        self._client.collect_by(self._status.numbers)

    def assign_runtime_port(self, settings: Settings) -> None:
        """Choose a port for the Dynamo runtime's own server, and set it in the environment.

        Raises:
            UsageError: no port is free.
        """
        from dynamo_mpi.telemetry.health_address import PORT_VARIABLE, runtime_port

        port = runtime_port(self._client.address, settings.runtime_system_port)
        os.environ[PORT_VARIABLE] = str(port)
        self._client.send("runtime", str(port))

    def on_failure_detected(self) -> None:
        """Send at once that the world ends."""
        self._client.send_failure()

    def on_failure(self, failure: WorldFailure) -> None:
        """Send why the world ends."""
        self._client.send_failure(failure.report)


def facts_of(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return facts about a worker, by their names in the health answers and in the metrics' labels."""
    namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
    facts = {
        "role": settings.role,
        "engine": settings.engine,
        "model": settings.served_model_name,
        "namespace": namespace,
        "component": component,
        "endpoint": settings.endpoint,
    }
    if not environ.get("TRACEPARENT"):
        return facts
    from dynamo_mpi.common.trace_context import trace_of

    trace = trace_of(environ)
    return facts if trace is None else {**facts, "trace": trace.parent}
