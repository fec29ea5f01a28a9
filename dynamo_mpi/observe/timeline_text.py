# SPDX-License-Identifier: Apache-2.0
"""A start for a terminal: a line of letters for each rank. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.observe.timeline_bars import place
from dynamo_mpi.observe.timeline_facts import describe_failure, facts_of, headline, identity, seconds, sentences
from dynamo_mpi.observe.timeline_scale import Scale, scale_for
from dynamo_mpi.observe.timeline_svg import columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.observe.timeline_bars import Row
    from dynamo_mpi.observe.timeline_facts import PhaseFacts

LETTERS = {
    "start": "s",
    "environment": "e",
    "world": "w",
    "preflight": "p",
    "load": "L",
    "prove": "v",
    "register": "r",
    "serve": "=",
    "drain": "d",
    "exit": "x",
}
_WAITS, _OTHER = ".", "#"
_LEAST_WIDTH, _MOST_HOST = 24, 20


def text(starts: Sequence[Start], width: int) -> str:
    """Write the starts down.

    Args:
        starts: at least one.
        width: of the terminal, in characters.
    """
    worlds, _ = place(starts)
    return "\n\n".join("\n".join(_lines(world.start, world.rows, width)) for world in worlds)


def _lines(start: Start, rows: Sequence[Row], width: int) -> Iterator[str]:
    facts = facts_of(rows)
    yield f"{start.model or start.name}: {headline(start)}" if start.layout else start.name
    if start.layout:
        yield f"{start.name}: {identity(start)}"
    if failure := describe_failure(start):
        yield f"failed: {failure}"
    yield from sentences(start, facts, rows)
    yield ""
    host_width = min(_MOST_HOST, max((columns(row.host) for row in rows), default=0))
    rank_width = len(str(max((row.rank for row in rows), default=0)))
    left = host_width + rank_width + 2
    notes = {row.rank: _note(start, row, facts) for row in rows}
    room = max(_LEAST_WIDTH, width - left - max(map(len, notes.values()), default=0) - 1)
    scale = scale_for([rows], 0.0, float(room))
    yield " " * left + _axis(scale, room)
    before = ""
    for row in rows:
        host = _cut(row.host, host_width) if row.host != before else ""
        before = row.host
        padding = " " * (host_width - columns(host))
        yield f"{host}{padding} {row.rank:{rank_width}} {_bar(row, scale, room)} {notes[row.rank]}".rstrip()
    known = [f"{LETTERS.get(fact.phase, _OTHER)} {fact.phase}" for fact in facts]
    calm = f", | {seconds(scale.calm[1] - scale.calm[0])} of serving" if scale.calm else ""
    yield " " * left + ", ".join([*known, f"{_WAITS} waits for others"]) + calm


def _cut(host: str, width: int) -> str:
    while columns(host) > width:
        host = host[:-1]
    return host


def _note(start: Start, row: Row, facts: Sequence[PhaseFacts]) -> str:
    slow = [fact for fact in facts if fact.slowest == row.rank and fact.is_uneven]
    parts = [f"{'last to' if fact.came_last else 'slowest in'} {fact.phase}, +{seconds(fact.behind)}" for fact in slow]
    if start.failure is not None and start.failure.rank == row.rank:
        parts.insert(0, "failed")
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
