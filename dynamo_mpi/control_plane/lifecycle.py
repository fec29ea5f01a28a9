# SPDX-License-Identifier: Apache-2.0
"""The events of a worker's life, as they go out over NATS. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.control_plane.failure_records import WorkerIdentity
from dynamo_mpi.control_plane.records import SCHEMA

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.failure_records import FailureRecord
    from dynamo_mpi.control_plane.records import WorldRecord

EVENTS = ("phase", "ready", "drain", "failed", "exit", "peers")
_ROOT = "dynamo_mpi.v1"
# what NATS takes for a separator or a wildcard
_NO_TOKEN = re.compile(r"[\s.*>]")


@dataclass(frozen=True)
class LifecycleEvent:
    """One event.

    Args:
        event: one of `EVENTS`.
        time: seconds since 1970.
        namespace: as in `WorldRecord`, like the rest up to ``pid``.
        phase: what the worker does now.
        failure: of ``failed``: what it ends of; null where that is not known here.
        exit_code: of ``exit``: what all ranks leave with.
        peers: of ``peers``: the worlds that hand KV over to this one or take it, as ``PLACE at ENDPOINT, phase PHASE``.
        news: of ``peers``: what has changed, in words.
    """

    event: str
    time: float
    namespace: str
    component: str
    role: str
    model: str
    endpoint: str
    launch: str | None
    job: str | None
    step: str | None
    attempt: int
    host: str
    pid: int
    phase: str
    failure: FailureRecord | None = None
    exit_code: int | None = None
    peers: tuple[str, ...] = ()
    news: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """Where it goes: ``dynamo_mpi.v1.NAMESPACE.COMPONENT.EVENT``."""
        return ".".join((_ROOT, *(_NO_TOKEN.sub("_", name) for name in (self.namespace, self.component, self.event))))

    def pack(self) -> bytes:
        """Encode as JSON; what belongs to other events is left out."""
        own = {"failed": ("failure",), "exit": ("exit_code",), "peers": ("peers", "news")}
        others = {name for names in own.values() for name in names} - set(own.get(self.event, ()))
        content: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in others}
        if self.failure is not None and "failure" in content:
            content["failure"] = {"schema": SCHEMA, **content["failure"]}
        return json.dumps({"schema": SCHEMA, **content}, separators=(",", ":")).encode()


def event_of(name: str, record: WorldRecord, phase: str, time: float, **own: Any) -> LifecycleEvent:
    """Return an event of a worker.

    Args:
        name: one of `EVENTS`.
        record: the worker's.
        phase: what it does now.
        time: seconds since 1970.
        own: what this event has beyond others.
    """
    return LifecycleEvent(
        event=name, time=time, host=record.host, pid=record.pid, phase=phase, **asdict(WorkerIdentity.of(record)), **own
    )
