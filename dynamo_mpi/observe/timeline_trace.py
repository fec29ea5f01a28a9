# SPDX-License-Identifier: Apache-2.0
"""A start as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing: a process for each node, a thread for each rank. Pure.

The format is Chrome's "Trace Event Format": complete events (X) in microseconds, names as metadata events (M), instants (i).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.observe.timeline import pack_starts
from dynamo_mpi.observe.timeline_bars import rows_of
from dynamo_mpi.observe.timeline_facts import describe_failure, headline, identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.observe.timeline_bars import Row

Event = dict[str, Any]


def trace(starts: Sequence[Start]) -> dict[str, Any]:
    """Return the trace of one or more workers' starts, with the data that it was made from.

    Args:
        starts: at least one.
    """
    origin = min(start.origin for start in starts)
    names: list[Event] = []
    events: list[Event] = []
    process = 0
    for start in starts:
        hosts: dict[str, int] = {}
        for row in rows_of(start, origin):
            if row.host not in hosts:
                process += 1
                hosts[row.host] = process
                title = f"{start.name} on {row.host}"
                names += _named("process", process, 0, title, process)
            names += _named("thread", hosts[row.host], row.rank, f"rank {row.rank}", row.rank)
            events += _events(row, hosts[row.host])
        events += _moments(start, origin, hosts)
    # of two that begin together, the one around the other comes first
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    return {
        "traceEvents": [*names, *events],
        "displayTimeUnit": "ms",
        "otherData": {f"{start.name}": f"{identity(start)}: {headline(start)}" for start in starts},
        "dynamo_mpi": pack_starts(starts),
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
        if bar.told:
            args |= {"own_seconds": round(bar.own, 6), "waited_seconds": round(bar.waited, 6)}
        if bar.open:
            args["goes_on"] = True
        yield {**common, "name": bar.phase, "ts": begin, "dur": end - begin, "args": args}
        if end > done:
            yield {**common, "name": "waits for others", "cat": "wait", "ts": done, "dur": end - done, "args": {}}


def _moments(start: Start, origin: float, hosts: dict[str, int]) -> Iterator[Event]:
    first = next(iter(hosts.values()), 0)
    if start.ready is not None:
        at = _micros(start.ready - origin)
        yield {"ph": "i", "s": "p", "name": "ready", "cat": "phase", "pid": first, "tid": 0, "ts": at, "args": {}}
    if start.failure is not None:
        process = hosts.get(start.failure.host, first)
        at = _micros(start.written - origin)
        args = {"error": describe_failure(start), "exit_code": start.failure.exit_code}
        name = {"ph": "i", "s": "t", "name": start.outcome, "cat": "phase"}
        yield {**name, "pid": process, "tid": start.failure.rank or 0, "ts": at, "args": args}


def _micros(moment: float) -> int:
    return max(0, round(moment * 1e6))
