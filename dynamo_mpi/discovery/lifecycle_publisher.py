# SPDX-License-Identifier: Apache-2.0
"""Tells of a worker's life over NATS, where there is one: see `lifecycle` for what goes out."""

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
    """One worker's events. Nothing here raises, or waits but to the extent that it says.

    Args:
        record: the worker.
        phase: what it does now.
        line: where they go; None for nowhere.
    """

    def __init__(self, record: WorkerRecord, phase: str, line: NatsPublisher | None) -> None:
        self._record, self._phase, self._line = record, phase, line
        self._exit_code: int | None = None
        self._send("phase")

    def on_phase(self, phase: str) -> None:
        """Send that a phase begins."""
        self._phase = phase
        self._send("phase")
        if phase == "drain":
            self._send("drain")

    def on_ready(self) -> None:
        """Send that requests are answered."""
        self._send("ready")

    def peers(self, peers: Sequence[StoredRecord], news: Sequence[str]) -> None:
        """Tell of the worlds that hand KV over to this one or take it.

        Args:
            peers: those that are there.
            news: what has changed.
        """
        self._send("peers", peers=tuple(describe(peer.record) for peer in peers), news=tuple(news))

    def on_failure(self, failure: WorldFailure) -> None:
        """Send what the worker ends of; waits half a second at the most for that to go out."""
        self._exit_code = failure.first.exit_code
        worker = WorkerIdentity.of(self._record)
        self._send("failed", failure=failure_record(worker, failure.first, failure.host, failure.report))
        if (line := self._line) is not None:
            line.flush(_FLUSH_SECONDS)

    def on_shutdown(self, code: int) -> None:
        """Send with which exit code the worker ends; waits half a second at the most for that to go out. Nothing is sent after it."""
        if (line := self._line) is not None:
            self._send("exit", exit_code=code if self._exit_code is None else self._exit_code)
            self._line = None
            line.close(_FLUSH_SECONDS)

    def on_exit(self, code: int) -> None:
        """The same, where there was no orderly shutdown."""
        self.on_shutdown(code)

    def _send(self, name: str, **own: Any) -> None:
        # another thread may say the last word meanwhile
        if (line := self._line) is not None:
            from dynamo_mpi.discovery.nats_publisher import Message

            event = event_of(name, self._record, self._phase, time.time(), **own)
            line.send(Message(event.subject, event.pack()))


def events_of(
    record: WorkerRecord, phase: str, environ: Mapping[str, str], request_plane: str, warn: Callable[[str], None]
) -> LifecycleEvents:
    """Return a worker's events; they go nowhere unless Dynamo's runtime uses NATS as well.

    Args:
        record: the worker.
        phase: what it does now.
        environ: where NATS and our credentials stand.
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
