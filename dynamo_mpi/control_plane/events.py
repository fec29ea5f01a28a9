# SPDX-License-Identifier: Apache-2.0
"""Tells of a worker's life over NATS, where there is one: see `lifecycle` for what goes out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.control_plane.connectivity import nats_server
from dynamo_mpi.control_plane.failure_records import WorkerIdentity, failure_record
from dynamo_mpi.control_plane.lifecycle import event_of
from dynamo_mpi.control_plane.nats_auth import NatsAuth
from dynamo_mpi.preflight.peers import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.control_plane.nats_publisher import NatsPublisher
    from dynamo_mpi.control_plane.records import StoredRecord, WorkerRecord
    from dynamo_mpi.supervision.failure import Failure

_FLUSH_SECONDS = 0.5


class Events:
    """One worker's. Nothing here raises, or waits but to the extent that it says.

    Args:
        record: the worker.
        phase: what it does now.
        line: where they go; None for nowhere.
    """

    def __init__(self, record: WorkerRecord, phase: str, line: NatsPublisher | None) -> None:
        self._record, self._phase, self._line = record, phase, line
        self._exit_code: int | None = None
        self._send("phase")

    def phase(self, name: str) -> None:
        """Tell that a phase begins. May be called from a signal's handler."""
        self._phase = name
        self._send("phase")
        if name == "drain":
            self._send("drain")

    def ready(self) -> None:
        """Tell that requests are answered."""
        self._send("ready")

    def peers(self, peers: Sequence[StoredRecord], news: Sequence[str]) -> None:
        """Tell of the worlds that hand KV over to this one or take it.

        Args:
            peers: those that are there.
            news: what has changed.
        """
        self._send("peers", peers=tuple(describe(peer.record) for peer in peers), news=tuple(news))

    def failed(self, failure: Failure, host: str, report: str) -> None:
        """Tell of what the worker ends of; waits half a second at the most for that to go out.

        Args:
            failure: the first cause.
            host: where it happened.
            report: what has been said of it.
        """
        self._exit_code = failure.exit_code
        self._send("failed", failure=failure_record(WorkerIdentity.of(self._record), failure, host, report))
        if (line := self._line) is not None:
            line.flush(_FLUSH_SECONDS)

    def exit(self, code: int | None = None) -> None:
        """Tell that the worker ends; waits half a second at the most for that to go out. Nothing goes out after it.

        Args:
            code: what all ranks leave with; None for that of the failure.
        """
        code = self._exit_code if code is None else code
        line, own = self._line, {"exit_code": code}
        if line is not None:
            if code is not None:
                self._send("exit", **own)
            self._line = None
            line.close(_FLUSH_SECONDS)

    def _send(self, name: str, **own: Any) -> None:
        # another thread may say the last word meanwhile
        if (line := self._line) is not None:
            from dynamo_mpi.control_plane.nats_publisher import Message

            event = event_of(name, self._record, self._phase, time.time(), **own)
            line.send(Message(event.subject, event.pack()))


def events_of(
    record: WorkerRecord, phase: str, environ: Mapping[str, str], request_plane: str, say: Callable[[str], None]
) -> Events:
    """Return a worker's events; they go nowhere unless Dynamo's runtime uses NATS as well.

    Args:
        record: the worker.
        phase: what it does now.
        environ: where NATS and our credentials stand.
        request_plane: ``"tcp"`` or ``"nats"``.
        say: for a line to the user.

    Raises:
        UsageError: the credentials can't be used.
    """
    server = nats_server(environ, request_plane)
    if server is None:
        return Events(record, phase, None)
    from dynamo_mpi.control_plane.nats_publisher import NatsPublisher

    line = NatsPublisher(server, NatsAuth.from_env(environ), say)
    line.start()
    return Events(record, phase, line)
