# SPDX-License-Identifier: Apache-2.0
"""Sends a worker's lifecycle events over NATS, if NATS is used; `lifecycle_events` defines them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.discovery.connectivity import nats_server
from dynamo_mpi.discovery.failure_records import WorkerIdentity, failure_record
from dynamo_mpi.discovery.lifecycle_events import event_of
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.peer_compat import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.discovery.nats_publisher import NatsPublisher
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

_FLUSH_SECONDS = 0.5


class LifecycleEvents(WorkerHook):
    """One worker's events. Nothing here raises; only `on_failure` and `on_shutdown` wait, for a limited time.

    Args:
        record: the worker's record.
        phase: its current phase.
        line: the connection to NATS; None to send nothing.
    """

    def __init__(self, record: WorkerRecord, phase: str, line: NatsPublisher | None) -> None:
        self._record, self._phase, self._line = record, phase, line
        self._exit_code: int | None = None
        self._send("phase")

    def on_phase(self, phase: str) -> None:
        """Send the start of a phase."""
        self._phase = phase
        self._send("phase")
        if phase == "drain":
            self._send("drain")

    def on_ready(self) -> None:
        """Send that the worker serves."""
        self._send("ready")

    def peers(self, peers: Sequence[StoredRecord], changes: Sequence[str]) -> None:
        """Send the workers that send KV to this one or receive it.

        Args:
            peers: their records.
            changes: one line for each change.
        """
        self._send("peers", peers=tuple(describe(peer.record) for peer in peers), news=tuple(changes))

    def on_failure(self, failure: WorldFailure) -> None:
        """Send why the worker ends; waits at most half a second until it is sent."""
        self._exit_code = failure.first.exit_code
        worker = WorkerIdentity.of(self._record)
        self._send("failed", failure=failure_record(worker, failure.first, failure.host, failure.report))
        if (line := self._line) is not None:
            line.flush(_FLUSH_SECONDS)

    def on_shutdown(self, code: int) -> None:
        """Send the worker's exit code; waits at most half a second until it is sent. Nothing is sent after it."""
        if (line := self._line) is not None:
            self._send("exit", exit_code=code if self._exit_code is None else self._exit_code)
            self._line = None
            line.close(_FLUSH_SECONDS)

    def on_exit(self, code: int) -> None:
        """Send the exit code if there was no orderly shutdown."""
        self.on_shutdown(code)

    def _send(self, name: str, **own: Any) -> None:
        # another thread may send the last event meanwhile
        if (line := self._line) is not None:
            from dynamo_mpi.discovery.nats_publisher import Message

            event = event_of(name, self._record, self._phase, time.time(), **own)
            line.send(Message(event.subject, event.pack()))


def events_of(
    record: WorkerRecord, phase: str, environ: Mapping[str, str], request_plane: str, warn: Callable[[str], None]
) -> LifecycleEvents:
    """Return a worker's event publisher; it sends nothing unless Dynamo's runtime uses NATS too.

    Args:
        record: the worker's record.
        phase: its current phase.
        environ: has NATS's address and our credentials.
        request_plane: ``"tcp"`` or ``"nats"``.
        warn: logs a warning.

    Raises:
        UsageError: the credentials can't be used.
    """
    server = nats_server(environ, request_plane)
    if server is None:
        return LifecycleEvents(record, phase, None)
    from dynamo_mpi.discovery.nats_publisher import NatsPublisher

    line = NatsPublisher(server, NatsAuth.from_env(environ), warn)
    line.start()
    return LifecycleEvents(record, phase, line)
