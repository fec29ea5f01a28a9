# SPDX-License-Identifier: Apache-2.0
"""The trace of a worker's start: the worker, how the start ended, every rank's phases; files that hold it; the same as bars on one clock."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.common.phases import RankTimings, Span
from dynamo_mpi.common.record_codec import read_fields
from dynamo_mpi.discovery.records import RecordedLayout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dynamo_mpi.common.own_files import OwnFolder

SCHEMA = 1
"""Increases if a field is removed or changes its meaning, not if a field is added."""
READY, ENDED, FAILED, STOPPED = "ready", "ended", "failed", "stopped"
DATA_BEGINS, DATA_ENDS = '<script type="application/json" id="dynamo-mpi-timeline">', "</script>"
"""What surrounds the JSON in a page."""
_MAX_SECONDS = 1e11
_MAX_TEXT = 500
MOST_FILE_BYTES = 64 * 2**20
_SPAN_FIELDS = 4
# smaller differences come from a cluster's clocks and from the delay of messages
_TOLERANCE_SECONDS = 0.005
# with one time axis for starts that are hours apart, the starts themselves would be too short to see
_MAX_SPREAD = 4.0


@dataclass(frozen=True)
class FailureMark:
    """Why a start, or the run after it, ended.

    Args:
        rank: the rank that failed; None if no single rank did.
        host: its node.
        phase: the phase that the rank was in; empty if unknown.
        error: the first line of the error.
        exit_code: the exit code of the ranks.
        reported: whether the rank reported the error itself; otherwise ``error`` is what others observed of the rank.
    """

    rank: int | None
    host: str
    phase: str
    error: str
    exit_code: int
    reported: bool = True


@dataclass(frozen=True)
class StartupTrace:
    """One worker's start, or that of the services before it.

    Args:
        name: identifies it on a page with several.
        role: ``agg``, ``prefill``, ``decode`` or ``encode``; ``launch`` if it is not a worker.
        engine: ``trtllm`` or ``reference``; empty if it is not a worker.
        model: the name that clients ask for.
        endpoint: ``dyn://namespace.component.endpoint``.
        outcome: ``ready``, ``ended`` (in order), ``failed`` or ``stopped`` (by a signal, before it was ready).
        written: when this was written, in seconds since 1970 by the clock of rank 0, as all times here.
        ready: when the worker became ready; None if it never was.
        ranks: their phases, in rank order.
        layout: the worker's parallel layout; None if it is not a worker.
        failure: why it failed or was stopped.
        job: Slurm's job id.
        step: Slurm's step id.
        attempt: the number of this start of the worker, from 1 on.
    """

    name: str
    role: str
    engine: str
    model: str
    endpoint: str
    outcome: str
    written: float
    ready: float | None
    ranks: tuple[RankTimings, ...]
    layout: RecordedLayout | None = None
    failure: FailureMark | None = None
    job: str | None = None
    step: str | None = None
    attempt: int = 1

    @property
    def origin(self) -> float:
        """When the first of its ranks began, in seconds since 1970."""
        return min((rank.began + rank.spans[0].began for rank in self.ranks if rank.spans), default=self.written)


def printable(text: str) -> str:
    """Return text on one line, of at most 500 characters; each character that can't be printed becomes U+FFFD."""
    line = " ".join(text.split())[:_MAX_TEXT]
    return "".join(char if char.isprintable() else "\ufffd" for char in line)


def encode_traces(traces: Sequence[StartupTrace]) -> dict[str, Any]:
    """Return traces as JSON objects. Times are rounded to 0.1 ms: a cluster's clocks agree no better."""
    return {"schema": SCHEMA, "workers": [_encode(trace) for trace in traces]}


def decode_traces(text: str) -> tuple[StartupTrace, ...]:
    """Read the JSON that `encode_traces` made, in this version or another, or a Perfetto trace that contains it.

    Raises:
        ValueError: the text is something else.
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
    return tuple(_decode(worker) for worker in workers)


def read_traces(path: Path, folder: OwnFolder | None = None) -> tuple[StartupTrace, ...]:
    """Read a page or a Perfetto trace that a worker, or ``dynamo-mpi timeline``, has written.

    Args:
        path: the file.
        folder: the folder that it is in, if the file must be this user's; None if the user names the file: any owner will do.

    Raises:
        UsageError: the file can't be read.
        ConfigFileError: the file contains no timeline.
    """
    try:
        if folder is not None:
            content = folder.read(path.name, MOST_FILE_BYTES).decode()
        else:
            with open(path, encoding="utf-8") as file:
                content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path} can't be read: {error.strerror}",
            expected="a page or trace that a worker has written",
            fix="check its path and rights",
        ) from None
    except UnicodeDecodeError:
        content = ""
    try:
        if len(content) > MOST_FILE_BYTES:
            raise ValueError(f"larger than {MOST_FILE_BYTES // 2**20} MiB")
        if content.lstrip().startswith("<"):
            _, found, rest = content.partition(DATA_BEGINS)
            if not found:
                raise ValueError("a page without a timeline's data")
            content = rest.partition(DATA_ENDS)[0]
        traces = decode_traces(content)
        if not traces:
            raise ValueError("without workers")
        return traces
    except ValueError as error:
        raise ConfigFileError(
            f"{path} is no timeline: {error}",
            expected="a page or a trace that a worker wrote with --timeline",
            fix="name the file that --timeline named, or with --run-dir the folder of dynamo-mpi launch",
        ) from None


def _encode(trace: StartupTrace) -> dict[str, Any]:
    plain = {name: value for name, value in vars(trace).items() if name not in ("ranks", "layout", "failure")}
    return {
        **plain,
        "layout": trace.layout and asdict(trace.layout),
        # by its former name too, until 0.2
        "failure": trace.failure and {**asdict(trace.failure), "told": trace.failure.reported},
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.host,
                "began": round(rank.began, 4),
                "spans": [
                    [span.phase, *(None if value is None else round(value, 4) for value in span[1:])]
                    for span in rank.spans
                ],
            }
            for rank in trace.ranks
        ],
    }


def _decode(data: object) -> StartupTrace:
    if not isinstance(data, dict):
        raise ValueError("a worker is no object")
    layout, failure, ranks = data.get("layout"), data.get("failure"), data.get("ranks")
    if not isinstance(ranks, list):
        raise ValueError("a worker without ranks")
    trace = read_fields(
        StartupTrace,
        data,
        layout=None if layout is None else read_fields(RecordedLayout, layout),
        failure=None if failure is None else _decode_failure(failure),
        ranks=tuple(_decode_rank(rank) for rank in ranks),
    )
    for moment in (trace.written, trace.ready):
        _seconds(moment)
    return trace


def _decode_failure(data: object) -> FailureMark:
    if isinstance(data, dict) and "told" in data:  # a file of an earlier version
        data = {"reported": data["told"], **data}
    return read_fields(FailureMark, data)


def _decode_rank(data: object) -> RankTimings:
    if not isinstance(data, dict) or not isinstance(data.get("spans"), list) or type(data.get("rank")) is not int:
        raise ValueError("a rank is none")
    host, began = data.get("host"), _seconds(data.get("began"))
    if not isinstance(host, str) or not host.isprintable() or began is None:
        raise ValueError("a rank without host or beginning")
    return RankTimings(data["rank"], host, began, tuple(_decode_span(span) for span in data["spans"]))


def _decode_span(data: object) -> Span:
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
    # an integer may be too large for a float, and NaN is not within bounds either
    if not number or not -_MAX_SECONDS <= value <= _MAX_SECONDS:  # type: ignore[operator,unused-ignore] # it is one
        raise ValueError("a time is no number of seconds")
    return float(value)  # type: ignore[arg-type] # it is a number


class Bar(NamedTuple):
    """One phase of one rank, in seconds from the beginning of the picture.

    Args:
        phase: its name.
        begin: when it began.
        own_end: when the rank's own part was done; from then on it waited for other ranks.
        end: when it ended.
        reported: whether the rank has reported when its own part was done.
        open: whether it had not ended when this was written.
    """

    phase: str
    begin: float
    own_end: float
    end: float
    reported: bool
    open: bool

    @property
    def own(self) -> float:
        """How long the rank's own part took, as far as is known."""
        return self.own_end - self.begin


class Row(NamedTuple):
    """One rank: its bars in order, without overlap, and how many of them had to be clipped for that."""

    rank: int
    host: str
    bars: tuple[Bar, ...]
    clipped: int


class AlignedTrace(NamedTuple):
    """A trace on the picture's clock, which begins at ``origin``, in seconds since 1970."""

    trace: StartupTrace
    rows: tuple[Row, ...]
    origin: float


def rows_of(trace: StartupTrace, origin: float) -> tuple[Row, ...]:
    """Return a worker's rows, in rank order.

    Args:
        trace: the worker's.
        origin: the beginning of the picture, in seconds since 1970.
    """
    now = max(0.0, trace.written - origin)
    return tuple(_row(rank, origin, now) for rank in sorted(trace.ranks, key=lambda rank: rank.rank))


def _row(rank: RankTimings, origin: float, now: float) -> Row:
    bars: list[Bar] = []
    clipped, free = 0, 0.0
    for span in rank.spans:
        began = rank.began + span.began - origin
        ended = max(began, now) if span.total is None else began + span.total
        done = ended if span.local is None else began + span.local
        begin = max(began, free)
        end = max(begin, ended)
        own_end = min(max(begin, done), end)
        moved = max(begin - began, end - ended, done - ended if span.total is not None else 0.0, begin - done)
        clipped += moved > _TOLERANCE_SECONDS
        bars.append(Bar(span.phase, begin, own_end, end, span.local is not None, span.total is None))
        free = end
    return Row(rank.rank, rank.host, tuple(bars), clipped)


def align(traces: Sequence[StartupTrace]) -> tuple[list[AlignedTrace], bool]:
    """Put all traces on one clock, or each on its own if they are far apart; the second result is whether they share one."""
    alone = [AlignedTrace(trace, rows_of(trace, trace.origin), trace.origin) for trace in traces]
    lengths = [_startup_seconds(one) for one in alone]
    first = min(one.origin for one in alone)
    if max(one.origin - first + length for one, length in zip(alone, lengths, strict=True)) > _MAX_SPREAD * max(
        lengths
    ):
        return alone, False
    return [AlignedTrace(trace, rows_of(trace, first), first) for trace in traces], True


def _startup_seconds(one: AlignedTrace) -> float:
    if one.trace.ready is not None:
        return max(0.001, one.trace.ready - one.origin)
    return max([0.001, *(bar.end for row in one.rows for bar in row.bars)])
