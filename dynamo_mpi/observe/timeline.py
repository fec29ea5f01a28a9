# SPDX-License-Identifier: Apache-2.0
"""A worker's start as data: who, how it ended, and every rank's phases; and that as JSON. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.control_plane.record_codec import read_fields
from dynamo_mpi.control_plane.records import RecordedLayout
from dynamo_mpi.supervision.phases import Span
from dynamo_mpi.supervision.roll import RankSpans

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = 1
"""Grows when something is taken away or changes its meaning; what is only added is no new schema."""
READY, ENDED, FAILED, STOPPED = "ready", "ended", "failed", "stopped"
_MOST_SECONDS = 1e11
_MOST_ERROR = 500
_SPAN_FIELDS = 4


@dataclass(frozen=True)
class Mishap:
    """Why a start, or what came after it, ended.

    Args:
        rank: where; None where it is no rank's.
        host: its node.
        phase: what that rank was doing; empty where it isn't known.
        error: the first line of it.
        exit_code: what the ranks left with.
        told: whether that rank said it itself; else it is what was seen of it, to be read behind its name.
    """

    rank: int | None
    host: str
    phase: str
    error: str
    exit_code: int
    told: bool = True


@dataclass(frozen=True)
class Start:
    """One worker's start; or that of the services, which is told in the same form.

    Args:
        name: tells it from others on the same page.
        role: ``agg``, ``prefill``, ``decode`` or ``encode``; ``launch`` for what is no worker.
        engine: ``trtllm`` or ``reference``; empty for what is no worker.
        model: the name that clients ask for.
        endpoint: ``dyn://namespace.component.endpoint``.
        outcome: ``ready``, ``ended`` (in order), ``failed`` or ``stopped`` (by a signal, before it was ready).
        written: when this was written, in seconds since 1970 by the clock of rank 0, as all moments here.
        ready: when it was ready; None where it never was.
        ranks: their phases, in rank order.
        layout: how it is divided; None for what is no worker.
        failure: why it failed or was stopped.
        job: Slurm's job id.
        step: Slurm's step id.
        attempt: which start of this worker it is, from 1 on.
    """

    name: str
    role: str
    engine: str
    model: str
    endpoint: str
    outcome: str
    written: float
    ready: float | None
    ranks: tuple[RankSpans, ...]
    layout: RecordedLayout | None = None
    failure: Mishap | None = None
    job: str | None = None
    step: str | None = None
    attempt: int = 1

    @property
    def origin(self) -> float:
        """When the first of its ranks began, in seconds since 1970."""
        return min((rank.began + rank.spans[0].began for rank in self.ranks if rank.spans), default=self.written)


def pack_starts(starts: Sequence[Start]) -> dict[str, Any]:
    """Return what JSON is to hold. Times are rounded to a tenth of a millisecond, which no clock of a cluster knows better."""
    return {"schema": SCHEMA, "workers": [_pack(start) for start in starts]}


def unpack_starts(text: str) -> tuple[Start, ...]:
    """Read what `pack_starts` made, here or in another version.

    Raises:
        ValueError: it isn't that.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if isinstance(content, dict) and "traceEvents" in content:
        content = content.get("dynamo_mpi")
    if not isinstance(content, dict) or type(content.get("schema")) is not int:
        raise ValueError("no timeline of dynamo_mpi")
    if content["schema"] != SCHEMA:
        raise ValueError(f"of schema {content['schema']}, not {SCHEMA}")
    workers = content.get("workers")
    if not isinstance(workers, list):
        raise ValueError("without workers")
    return tuple(_unpack(worker) for worker in workers)


def printable(text: str) -> str:
    """Return text on one line that can be shown and read back: what can't be printed becomes a replacement character."""
    line = " ".join(text.split())[:_MOST_ERROR]
    return "".join(char if char.isprintable() else "\ufffd" for char in line)


def _pack(start: Start) -> dict[str, Any]:
    plain = {name: value for name, value in vars(start).items() if name not in ("ranks", "layout", "failure")}
    return {
        **plain,
        "layout": start.layout and asdict(start.layout),
        "failure": start.failure and asdict(start.failure),
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.host,
                "began": round(rank.began, 4),
                "spans": [[span.phase, *map(_rounded, span[1:])] for span in rank.spans],
            }
            for rank in start.ranks
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _unpack(data: object) -> Start:
    if not isinstance(data, dict):
        raise ValueError("a worker is no object")
    layout, failure, ranks = data.get("layout"), data.get("failure"), data.get("ranks")
    if not isinstance(ranks, list):
        raise ValueError("a worker without ranks")
    start = read_fields(
        Start,
        data,
        layout=None if layout is None else read_fields(RecordedLayout, layout),
        failure=None if failure is None else read_fields(Mishap, failure),
        ranks=tuple(_unpack_rank(rank) for rank in ranks),
    )
    for moment in (start.written, start.ready):
        _seconds(moment)
    return start


def _unpack_rank(data: object) -> RankSpans:
    if not isinstance(data, dict) or not isinstance(data.get("spans"), list) or type(data.get("rank")) is not int:
        raise ValueError("a rank is none")
    host, began = data.get("host"), _seconds(data.get("began"))
    if not isinstance(host, str) or not host.isprintable() or began is None:
        raise ValueError("a rank without host or beginning")
    return RankSpans(data["rank"], host, began, tuple(_unpack_span(span) for span in data["spans"]))


def _unpack_span(data: object) -> Span:
    if not isinstance(data, list) or len(data) < _SPAN_FIELDS:
        raise ValueError("a phase is none")
    phase, began = data[0], _seconds(data[1])
    if not isinstance(phase, str) or not phase.isprintable() or began is None:
        raise ValueError("a phase without name or beginning")
    return Span(phase, began, _seconds(data[2]), _seconds(data[3]))


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # an integer may be too large for a float, and what is not a number is not within bounds either
    if not number or not -_MOST_SECONDS <= value <= _MOST_SECONDS:  # type: ignore[operator,unused-ignore] # it is one
        raise ValueError("a time is no number of seconds")
    return float(value)  # type: ignore[arg-type] # it is a number
