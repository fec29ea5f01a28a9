# SPDX-License-Identifier: Apache-2.0
"""What the modules of rank 0 share, and its hooks. A hook is imported only if the user has enabled what it does."""

from __future__ import annotations

import os
from functools import partial

from dynamo_mpi.common.credentials import clients_environ
from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.common.hooks import WorkerHooks
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.supervisor.leases import OwnedLeases
from dynamo_mpi.telemetry.health_publisher import HealthPublisher, WorldStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.rank_report import RankReport, ReportRequest
    from dynamo_mpi.common.hooks import WorkerHooks
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.discovery.record_publisher import RecordPublisher
    from dynamo_mpi.discovery.records import WorkerRecord
    from dynamo_mpi.discovery.registration_monitor import InstanceLease
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor
    from dynamo_mpi.telemetry.health_client import HealthClient
    from dynamo_mpi.telemetry.sd_notify import SystemdNotifier


@dataclass(frozen=True)
class WorkerContext:
    """The context of one worker on rank 0.

    Args:
        rank: rank 0's context.
        settings: the worker's settings.
        supervisor: supervises and ends the world.
        hooks: the observers of the worker's lifecycle.
        reports: the ranks' preflight reports, in rank order.
        instance_lease: the lease of Dynamo's instance, for deregistration.
    """

    rank: RankContext
    settings: Settings
    supervisor: WorldSupervisor
    hooks: WorkerHooks
    reports: Sequence[RankReport]
    instance_lease: InstanceLease


# a shutdown's time besides the drain: deregistration, the engine's last step, the ranks' last barrier
_END_SECONDS = 60.0


class LeaderHooks(WorkerHooks):
    """Rank 0's hooks. They are added during the start: `add_status_hooks`, `add_record_hooks`, `add_supervision_hooks`.

    Args:
        context: rank 0's context.
        health_client: connection to the health server; None if there is none.
        notifier: the sd_notify client; None if there is none.

    Attributes:
        leases: the leases that the worker owns in etcd.
        status: the worker's status; None until the settings are read.
        record: the worker's record; None until it is created.
        preflight: rank 0's request of the preflight and its own report, with which spare nodes are compared; None until it has passed.
    """

    def __init__(
        self, context: RankContext, health_client: HealthClient | None, notifier: SystemdNotifier | None
    ) -> None:
        super().__init__(context.log.warning)
        self._context, self._health_client, self._notifier = context, health_client, notifier
        self._health: HealthPublisher | None = None
        self.leases = OwnedLeases(context.agent)
        self.status: WorldStatus | None = None
        self.record: WorkerRecord | None = None
        self.preflight: tuple[ReportRequest, RankReport] | None = None
        self.add(self.leases)
        if notifier is not None:
            self.add(notifier)
            # this phase began before there were hooks
            notifier.on_phase(context.phases.current)
        context.phases.on_phase(self.on_phase)

    @property
    def system_url(self) -> str | None:
        """URL of the health server; None if there is none."""
        if self._health_client is None:
            return None
        from dynamo_mpi.telemetry.health_address import url_of

        return url_of(self._health_client.address)

    def add_status_hooks(self, settings: Settings) -> None:
        """Add the hooks that show the worker's status, and remove the files of an earlier start."""
        if settings.ready_file is not None:
            from dynamo_mpi.runtime.worker_record import remove_ready_file

            if problem := remove_ready_file(settings.ready_file):
                self._context.log.warning(
                    f"a ready file of an earlier start, {settings.ready_file}, can't be removed: {problem}"
                )
        if settings.timeline is not None:
            from dynamo_mpi.telemetry.trace_writer import remove_stale_timeline

            if problem := remove_stale_timeline(settings.timeline):
                self._context.log.warning(
                    f"a timeline of an earlier start, {settings.timeline}, can't be removed: {problem}"
                )
        if os.environ.get("TRACEPARENT"):
            from dynamo_mpi.common.trace_context import remove_invalid

            if problem := remove_invalid(os.environ):
                self._context.log.warning(problem)
        self.status = WorldStatus(self._context, settings)
        self.add(self.status)
        if self._health_client is not None:
            self._health = HealthPublisher(self._health_client, self.status)
            self.add(self._health)
        if self._notifier is not None:
            self._notifier.worker = f"{settings.served_model_name} at {settings.endpoint}"
            self._notifier.seconds |= {
                "load": settings.load_timeout,
                "warmup": settings.warmup_timeout,
                "drain": settings.drain_timeout + _END_SECONDS,
            }
        if settings.metrics_file is not None:
            from dynamo_mpi.telemetry.metrics import MetricsFile

            self.add(MetricsFile(settings.metrics_file, self.status.as_metrics_file, self._context.log.warning))

    def assign_runtime_port(self, settings: Settings) -> None:
        """Assign the Dynamo runtime a port besides the health server's.

        Raises:
            UsageError: there is no free port.
        """
        if self._health is not None:
            self._health.assign_runtime_port(settings)

    def add_record_hooks(self, settings: Settings, record: WorkerRecord) -> RecordPublisher:
        """Add the hooks that publish the worker's record and failure in etcd and its events over NATS.

        Returns:
            The record's publisher, which has not published yet.

        Raises:
            UsageError: the credentials for NATS can't be used.
        """
        from dataclasses import asdict

        from dynamo_mpi.discovery.failure_records import FailureRecordStore, WorkerIdentity
        from dynamo_mpi.discovery.lifecycle_events import events_of
        from dynamo_mpi.discovery.record_publisher import RecordPublisher

        facts = self.status.facts if self.status is not None else {}
        self.record = record = replace(record, system=self.system_url, trace=facts.get("trace"))
        origin = WorkerIdentity.of(record)
        self.leases.set_worker(asdict(origin))
        log = self._context.log
        events = events_of(record, self._context.phases.current, clients_environ(), settings.request_plane, log.warning)
        record_publisher = RecordPublisher(log, record, partial(self.leases.add, "record"), events.peers)
        self.add(record_publisher, FailureRecordStore(origin, clients_environ(), lambda: self.leases.record), events)
        return record_publisher

    def add_instance_lease(self, settings: Settings) -> InstanceLease:
        """Add the lease of Dynamo's instance, which is revoked at a failure."""
        from dynamo_mpi.discovery.registration_monitor import InstanceLease

        lease = InstanceLease(settings.endpoint, clients_environ(), self.on_registered)
        self.add(lease)
        return lease

    def add_supervision_hooks(self, settings: Settings, supervisor: WorldSupervisor, preflight_seconds: float) -> None:
        """Add the hooks that show the state of the supervised ranks."""
        from dynamo_mpi.runtime.worker_record import ReadyFile
        from dynamo_mpi.telemetry.progress import ProgressReporter

        if self.status is not None:
            self.status.tracker = supervisor.tracker
        if self._health is not None:
            self._health.collect()
        self.add(ReadyFile(self._context, settings, preflight_seconds, self.system_url, self.preflight))
        if settings.timeline is not None and self.record is not None:
            from dynamo_mpi.telemetry.trace_writer import TraceWriter

            self.add(TraceWriter(settings.timeline, self.record, supervisor, self._context.log))
        progress = ProgressReporter(self._context, supervisor.tracker, settings, self.on_progress)
        self.add(progress)
        progress.start()
