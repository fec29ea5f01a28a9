# SPDX-License-Identifier: Apache-2.0
"""Startup traces as text for a terminal, and as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing. Pure.

The latter is in Chrome's "Trace Event Format", with a process for each node and a thread for each rank: complete events (X) in
microseconds, names as metadata events (M), instants (i).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.telemetry.startup_summary import (
    columns,
    describe_failure,
    describe_phases,
    describe_worker,
    format_seconds,
    headline,
    part_of,
    scale_for,
    summarize_phases,
)
from dynamo_mpi.telemetry.startup_trace import AlignedTrace, align, encode_traces, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.telemetry.startup_summary import PhaseSummary, Scale
    from dynamo_mpi.telemetry.startup_trace import Row, StartupTrace

Event = dict[str, Any]
LETTERS = {
    "start": "s",
    "environment": "e",
    "mpi_init": "w",
    "preflight": "p",
    "hardware_check": "b",
    "stage": "g",
    "load": "L",
    "warmup": "v",
    "register": "r",
    "serve": "=",
    "drain": "d",
    "exit": "x",
}
_WAITS, _OTHER = ".", "#"
_MIN_WIDTH, _MAX_HOST = 24, 20


def text(traces: Sequence[StartupTrace], width: int) -> str:
    """Return the traces as text: a line of letters for each rank.

    Args:
        traces: at least one.
        width: of the terminal, in characters.
    """
    aligned, together = align(traces)
    tables = [_Table.of(one) for one in aligned]
    left = max(table.host_width + table.rank_width for table in tables) + 2
    noted = max(len(note) for table in tables for note in table.notes.values())
    room = max(_MIN_WIDTH, width - left - noted - 1)
    shared = scale_for([one.rows for one in aligned], 0.0, float(room)) if together else None
    return "\n\n".join(
        "\n".join(
            [*_header(table), "", *_drawing(table, shared or scale_for([table.rows], 0.0, float(room)), left, room)]
        )
        for table in tables
    )


class _Table(NamedTuple):
    """One worker, with what its lines need."""

    trace: StartupTrace
    rows: tuple[Row, ...]
    phases: tuple[PhaseSummary, ...]
    notes: dict[int, str]
    names: dict[int, str]
    host_width: int
    rank_width: int

    @classmethod
    def of(cls, one: AlignedTrace) -> _Table:
        phases = summarize_phases(one.rows)
        notes = {row.rank: _note(one.trace, row, phases) for row in one.rows}
        host_width = min(_MAX_HOST, max((columns(row.host) for row in one.rows), default=0))
        names = {row.rank: str(row.rank) if one.trace.layout else part_of(row) for row in one.rows}
        rank_width = max(map(len, names.values()), default=0)
        return cls(one.trace, one.rows, phases, notes or {0: ""}, names, host_width, rank_width)


def _header(table: _Table) -> Iterator[str]:
    trace = table.trace
    if trace.layout:
        yield f"{trace.model}: {headline(trace)}"
        yield f"{trace.name}: {describe_worker(trace)}"
    else:
        yield trace.name
    if failure := describe_failure(trace):
        yield f"{trace.outcome}: {failure}"
    yield from describe_phases(trace, table.phases, table.rows)


def _drawing(table: _Table, scale: Scale, left: int, room: int) -> Iterator[str]:
    yield " " * left + _axis(scale, room)
    before = ""
    host_width = left - 2 - table.rank_width
    for row in table.rows:
        host = _cut(row.host, host_width) if row.host != before else ""
        before = row.host
        rank = f"{table.names[row.rank]:>{table.rank_width}}"
        padding = " " * (host_width - columns(host))
        yield f"{host}{padding} {rank} {_bar(row, scale, room)} {table.notes[row.rank]}".rstrip()
    known = [f"{LETTERS.get(phase.phase, _OTHER)} {phase.phase}" for phase in table.phases]
    waits = [f"{_WAITS} waits for others"] if table.trace.layout else []
    calm = [f"| {format_seconds(scale.calm[1] - scale.calm[0])} of serving"] if scale.calm else []
    yield from (" " * left + line for line in _wrapped([*known, *waits, *calm], room))


def _wrapped(items: Sequence[str], width: int) -> Iterator[str]:
    """Join items by commas, as many on a line as there is room for."""
    line = ""
    for item in items:
        longer = f"{line}, {item}" if line else item
        if line and len(longer) > width:
            yield f"{line},"
            longer = item
        line = longer
    yield line


def _cut(host: str, width: int) -> str:
    while columns(host) > width:
        host = host[:-1]
    return host


def _note(trace: StartupTrace, row: Row, phases: Sequence[PhaseSummary]) -> str:
    parts = ["failed"] if trace.failure is not None and trace.failure.rank == row.rank else []
    for phase in phases:
        if phase.slowest == row.rank and phase.is_uneven:
            how = "last to" if phase.by_arrival else "slowest in"
            parts.append(f"{how} {phase.phase}, +{format_seconds(phase.behind)}")
    return "< " + "; ".join(parts) if parts else ""


def _axis(scale: Scale, room: int) -> str:
    line = ""
    for moment, label in scale.ticks():
        at = int(scale.x(moment))
        if at >= len(line) + (1 if line else 0) and at + len(label) <= room:
            line += " " * (at - len(line)) + label
    return line


def _bar(row: Row, scale: Scale, room: int) -> str:
    cells = [" "] * room
    for bar in row.bars:
        letter = LETTERS.get(bar.phase, _OTHER)
        first, own, last = (min(room, round(scale.x(moment))) for moment in (bar.begin, bar.own_end, bar.end))
        cells[first:own] = letter * (own - first)
        cells[own:last] = _WAITS * (last - own)
    if scale.calm is not None:
        cells[min(room - 1, round(scale.x(sum(scale.calm) / 2)))] = "|"
    return "".join(cells)


def perfetto_trace(traces: Sequence[StartupTrace]) -> dict[str, Any]:
    """Return the Perfetto trace of one or more workers' starts, with the data that it was made from.

    Args:
        traces: at least one.
    """
    origin = min(trace.origin for trace in traces)
    names: list[Event] = []
    events: list[Event] = []
    process = 0
    for trace in traces:
        hosts: dict[str, int] = {}
        for row in rows_of(trace, origin):
            if row.host not in hosts:
                process += 1
                hosts[row.host] = process
                names += _named("process", process, 0, f"{trace.name} on {row.host}", process)
            names += _named("thread", hosts[row.host], row.rank, f"rank {row.rank}", row.rank)
            events += _events(row, hosts[row.host])
        events += _instants(trace, origin, hosts)
    # of two events that begin together, the one that encloses the other comes first
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    return {
        "traceEvents": [*names, *events],
        "displayTimeUnit": "ms",
        "otherData": {trace.name: f"{describe_worker(trace)}: {headline(trace)}" for trace in traces},
        "dynamo_mpi": encode_traces(traces),
    }


def _named(what: str, process: int, thread: int, name: str, place: int) -> list[Event]:
    common = {"ph": "M", "pid": process, "tid": thread, "ts": 0}
    return [
        {**common, "name": f"{what}_name", "args": {"name": name}},
        {**common, "name": f"{what}_sort_index", "args": {"sort_index": place}},
    ]


def _events(row: Row, process: int) -> Iterator[Event]:
    for bar in row.bars:
        begin, done, end = _micros(bar.begin), _micros(bar.own_end), _micros(bar.end)
        common = {"ph": "X", "cat": "phase", "pid": process, "tid": row.rank}
        args: dict[str, Any] = {"rank": row.rank, "host": row.host}
        if bar.reported:
            args |= {"own_seconds": round(bar.own, 6), "waited_seconds": round(bar.end - bar.own_end, 6)}
        if bar.open:
            args["goes_on"] = True
        yield {**common, "name": bar.phase, "ts": begin, "dur": end - begin, "args": args}
        if end > done:
            yield {**common, "name": "waits for others", "cat": "wait", "ts": done, "dur": end - done, "args": {}}


def _instants(trace: StartupTrace, origin: float, hosts: dict[str, int]) -> Iterator[Event]:
    first = next(iter(hosts.values()), 0)
    common = {"ph": "i", "cat": "phase", "pid": first, "tid": 0}
    if trace.ready is not None:
        yield {**common, "s": "p", "name": "ready", "ts": _micros(trace.ready - origin), "args": {}}
    if failure := trace.failure:
        args = {"error": describe_failure(trace), "exit_code": failure.exit_code}
        place = {"pid": hosts.get(failure.host, first), "tid": failure.rank or 0, "ts": _micros(trace.written - origin)}
        yield {**common, "s": "t", "name": trace.outcome, **place, "args": args}


def _micros(moment: float) -> int:
    return max(0, round(moment * 1e6))
