# SPDX-License-Identifier: Apache-2.0
"""Creates rank 0's hooks. A hook is imported only if the user has enabled what it does."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHooks
from dynamo_mpi.common.trace_context import PARENT_VARIABLE, STATE_VARIABLE, invalid_reason
from dynamo_mpi.runtime.ready_file import ReadyFile, remove_ready_file
from dynamo_mpi.supervisor.owned_leases import OwnedLeases
from dynamo_mpi.telemetry.health_publisher import HealthPublisher, WorldStatus

if TYPE_CHECKING:
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.record_publisher import RecordPublisher
    from dynamo_mpi.discovery.records import WorkerRecord
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier

# beyond the drain itself: the deregistration, the engine's last step, the ranks' parting
_END_SECONDS = 60.0


class LeaderHooks(WorkerHooks):
    """Rank 0's hooks. They are added as a start goes on: `add_observers`, `add_record`, `add_watchers`.

    Args:
        context: rank 0's.
        reporter: to the process that answers probes; None where they aren't answered.
        notifier: to a supervisor; None where there is none.

    Attributes:
        leases: what the worker has in etcd.
        status: what is known of the worker as a whole, once the settings are read.
        record: the worker's record, once it is there.
    """

    def __init__(self, context: RankContext, reporter: HealthClient | None, notifier: SystemdNotifier | None) -> None:
        super().__init__(context.log.warning)
        self._context, self._reporter, self._notifier = context, reporter, notifier
        self._health: HealthPublisher | None = None
        self.leases = OwnedLeases(context.agent)
        self.status: WorldStatus | None = None
        self.record: WorkerRecord | None = None
        self.add(self.leases)
        if notifier is not None:
            self.add(notifier)
        context.phases.on_phase(self.on_phase)

    @property
    def system_url(self) -> str | None:
        """Where probes are answered; None where they aren't."""
        if self._reporter is None:
            return None
        from dynamo_mpi.telemetry.runtime_port import url_of

        return url_of(self._reporter.address)

    def add_observers(self, settings: Settings) -> None:
        """Add those that show what the worker is, and remove what an earlier start has left."""
        remove_ready_file(settings.ready_file)
        if settings.timeline is not None:
            from dynamo_mpi.telemetry.trace_writer import remove_stale_timeline

            remove_stale_timeline(settings.timeline)
        if problem := invalid_reason(os.environ):
            self._context.log.warning(problem)
            # the engine and Dynamo would read the same, and warn again
            for name in (PARENT_VARIABLE, STATE_VARIABLE):
                os.environ.pop(name, None)
        self.status = WorldStatus(self._context, settings)
        self.add(self.status)
        if self._reporter is not None:
            self._health = HealthPublisher(self._reporter, self.status)
            self.add(self._health)
        if self._notifier is not None:
            self._notifier.worker = f"{settings.served_model_name} at {settings.endpoint}"
            self._notifier.seconds |= {
                "load": settings.load_timeout,
                "prove": settings.prove_timeout,
                "drain": settings.drain_timeout + _END_SECONDS,
            }
        if settings.metrics_file is not None:
            from dynamo_mpi.telemetry.metrics_file import MetricsFile

            self.add(MetricsFile(settings.metrics_file, self.status.as_metrics_file, self._context.log.warning))

    def assign_runtime_port(self, settings: Settings) -> None:
        """Give the Dynamo runtime a port beside the one at which probes are answered.

        Raises:
            UsageError: there is none.
        """
        if self._health is not None:
            self._health.assign_runtime_port(settings)

    def add_record(self, settings: Settings, record: WorkerRecord) -> RecordPublisher:
        """Add those that publish what the worker is and does: its record and its failure in etcd, its events over NATS.

        Returns:
            The record's publisher, which has not published yet.

        Raises:
            UsageError: the credentials for NATS can't be used.
        """
        from dynamo_mpi.discovery.failure_records import FailureRecordStore, WorkerIdentity
        from dynamo_mpi.discovery.lifecycle_publisher import events_of
        from dynamo_mpi.discovery.record_publisher import RecordPublisher

        facts = self.status.facts if self.status is not None else {}
        self.record = record = replace(record, system=self.system_url, trace=facts.get("trace"))
        origin = WorkerIdentity.of(record)
        self.leases.set_worker(asdict(origin))
        log = self._context.log
        events = events_of(record, self._context.phases.current, os.environ, settings.request_plane, log.warning)
        presence = RecordPublisher(log, record, partial(self.leases.add, "record"), events.peers)
        self.add(presence, FailureRecordStore(origin, os.environ, lambda: self.leases.record), events)
        return presence

    def add_watchers(self, settings: Settings, guard: WorldSupervisor, preflight_seconds: float) -> None:
        """Add those that show how the ranks are, which are watched from now on."""
        from dynamo_mpi.telemetry.progress_reporter import ProgressReporter

        if self.status is not None:
            self.status.roll = guard.tracker
        if self._health is not None:
            self._health.collect()
        self.add(ReadyFile(self._context, settings, preflight_seconds, self.system_url))
        if settings.timeline is not None and self.record is not None:
            from dynamo_mpi.telemetry.trace_writer import TraceWriter

            self.add(TraceWriter(settings.timeline, self.record, guard, self._context.log))
        ticker = ProgressReporter(self._context, guard.tracker, settings, self.on_progress)
        self.add(ticker)
        ticker.start()
