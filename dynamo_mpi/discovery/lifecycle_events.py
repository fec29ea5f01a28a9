# SPDX-License-Identifier: Apache-2.0
"""The lifecycle events of a worker, and their publication over NATS, if NATS is used."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.discovery.connectivity import nats_server
from dynamo_mpi.discovery.failure_records import WorkerIdentity, failure_record
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.peer_compat import describe
from dynamo_mpi.discovery.records import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.discovery.failure_records import FailureRecord
    from dynamo_mpi.discovery.nats_publisher import NatsPublisher
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

EVENTS = ("phase", "ready", "drain", "failed", "exit", "peers")
_ROOT = "dynamo_mpi.v1"
# NATS's separators and wildcards
_NO_TOKEN = re.compile(r"[\s.*>]")


@dataclass(frozen=True)
class LifecycleEvent(WorkerIdentity):
    """One event.

    Args:
        role: as in `WorkerRecord`, like the rest up to ``attempt``, ``host`` and ``pid``.
        event: one of `EVENTS`.
        time: seconds since 1970.
        phase: its current phase.
        failure: of ``failed``: the reason; null if it isn't known.
        exit_code: of ``exit``: the exit code of all ranks.
        peers: of ``peers``: the workers that send KV to this one or receive it, as ``PLACE at ENDPOINT, phase PHASE``.
        news: of ``peers``: one line for each change.
    """

    event: str
    time: float
    host: str
    pid: int
    phase: str
    failure: FailureRecord | None = None
    exit_code: int | None = None
    peers: tuple[str, ...] = ()
    news: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The event's subject in NATS: ``dynamo_mpi.v1.NAMESPACE.COMPONENT.EVENT``."""
        return ".".join((_ROOT, *(_NO_TOKEN.sub("_", name) for name in (self.namespace, self.component, self.event))))

    def pack(self) -> bytes:
        """Encode as JSON; fields of other events are left out."""
        own = {"failed": ("failure",), "exit": ("exit_code",), "peers": ("peers", "news")}
        others = {name for names in own.values() for name in names} - set(own.get(self.event, ()))
        content: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in others}
        if self.failure is not None and "failure" in content:
            content["failure"] = {"schema": SCHEMA, **content["failure"]}
        return json.dumps({"schema": SCHEMA, **content}, separators=(",", ":")).encode()


def event_of(name: str, record: WorkerRecord, phase: str, time: float, **own: Any) -> LifecycleEvent:
    """Return an event of a worker.

    Args:
        name: one of `EVENTS`.
        record: the worker's.
        phase: its current phase.
        time: seconds since 1970.
        own: the fields of this event alone.
    """
    return LifecycleEvent(
        event=name, time=time, host=record.host, pid=record.pid, phase=phase, **asdict(WorkerIdentity.of(record)), **own
    )


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
