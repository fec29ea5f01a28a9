# SPDX-License-Identifier: Apache-2.0
"""What a worker died of, left in etcd for whoever asks later: its world record goes with it, and its logs may be on a node that is gone."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.plain_data import read_fields, read_object
from dynamo_mpi.control_plane.record import SCHEMA
from dynamo_mpi.observe.redact import own_redactor
from dynamo_mpi.supervision.failure import headline

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.record import WorldRecord
    from dynamo_mpi.supervision.failure import Failure

_ROOT = "dynamo_mpi/v1/failures/"
_MOST_REPORT_BYTES = 8192
_MOST_ERROR_CHARACTERS = 400
_MARK = "…"


@dataclass(frozen=True)
class Origin:
    """Whose failure it is: what the world record says of the worker, without what changes.

    Args:
        role: as in `WorldRecord`, and so on.
        component: Dynamo's.
        namespace: Dynamo's.
        endpoint: ``dyn://namespace.component.endpoint``.
        model: the name that clients ask for.
        launch: what `dynamo-mpi launch` calls it.
        job: Slurm's job id.
        step: Slurm's step id.
        attempt: which start of this worker it was.
    """

    role: str
    component: str
    namespace: str
    endpoint: str
    model: str
    launch: str | None
    job: str | None
    step: str | None
    attempt: int

    @classmethod
    def of(cls, record: WorldRecord) -> Origin:
        """Take it from the worker's record."""
        return cls(
            record.role,
            record.component,
            record.namespace,
            record.endpoint,
            record.model,
            record.launch,
            record.job,
            record.step,
            record.attempt,
        )


@dataclass(frozen=True)
class LastFailure:
    """Why a worker ended.

    Args:
        role: as in `Origin`, like the rest up to ``attempt``.
        rank: the one that failed first; -1 where it isn't known.
        host: that rank's node.
        phase: what that rank was doing.
        cause: how it became known: ``told``, ``death``, ``lost``, ``silence`` or ``signal``.
        exit_code: what all ranks have left with.
        error: the error, in a line.
        report: all that was said of it, clipped to 8 KiB.
        time: when it became known, in seconds since 1970.
    """

    role: str
    component: str
    namespace: str
    endpoint: str
    model: str
    launch: str | None
    job: str | None
    step: str | None
    attempt: int
    rank: int
    host: str
    phase: str
    cause: str
    exit_code: int
    error: str
    report: str
    time: float

    def pack(self) -> bytes:
        """Encode as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, data: bytes) -> LastFailure:
        """Decode what `pack` made, here or in another version.

        Raises:
            ValueError: it isn't one, or of a schema that isn't known here.
        """
        content = read_object(data, SCHEMA)
        report = content.get("report")
        # the one text of several lines; whoever shows it has to look at what it shows
        if not isinstance(report, str) or len(report.encode("utf-8", "replace")) > _MOST_REPORT_BYTES:
            raise ValueError("report is no text of at most 8 KiB")
        return read_fields(cls, content, report=report)


def last_failure(origin: Origin, failure: Failure, host: str, report: str) -> LastFailure:
    """Put together what is left behind.

    Args:
        origin: whose.
        failure: the first cause.
        host: where that happened.
        report: what has been said of it.
    """
    redact = own_redactor().redact
    line = headline(redact(failure.text))
    return LastFailure(
        **asdict(origin),
        rank=failure.rank,
        host=host,
        phase=failure.phase,
        cause=failure.cause.name.lower(),
        exit_code=failure.exit_code,
        error="".join(letter if letter.isprintable() else " " for letter in line)[:_MOST_ERROR_CHARACTERS],
        report=_clipped(redact(report)),
        time=time.time() - max(0.0, time.monotonic() - failure.at) if failure.at else time.time(),
    )


def failure_key(origin: Origin, lease: int) -> str:
    """Return where it stands: under the same name as the worker's record did."""
    return f"{failures_of(origin.namespace, origin.component)}{lease:x}"


def failures_of(namespace: str = "", component: str = "") -> str:
    """Return where the failures of a namespace, or of one component of it, stand; all of them without one."""
    return _ROOT + "".join(f"{name}/" for name in (namespace, component) if name)


def is_successor(origin: Origin, failure: LastFailure) -> bool:
    """Tell whether a worker takes the place of one that failed: a later start of it."""
    if (origin.component, origin.role) != (failure.component, failure.role):
        return False
    if origin.launch or failure.launch:
        return origin.launch == failure.launch
    return origin.job is not None and (origin.job, origin.step) == (failure.job, failure.step)


def _clipped(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= _MOST_REPORT_BYTES:
        return data.decode()
    # its beginning has the first cause
    return data[: _MOST_REPORT_BYTES - len(_MARK.encode())].decode(errors="ignore") + _MARK
