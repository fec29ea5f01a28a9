# SPDX-License-Identifier: Apache-2.0
"""The lifecycle events of a worker, as they are sent over NATS. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.discovery.failure_records import WorkerIdentity
from dynamo_mpi.discovery.records import SCHEMA

if TYPE_CHECKING:
    from dynamo_mpi.discovery.failure_records import FailureRecord
    from dynamo_mpi.discovery.records import WorkerRecord

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
