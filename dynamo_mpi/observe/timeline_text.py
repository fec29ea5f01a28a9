# SPDX-License-Identifier: Apache-2.0
"""A start for a terminal: a line of letters for each rank. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.observe.timeline_bars import place
from dynamo_mpi.observe.timeline_facts import describe_failure, facts_of, headline, identity, seconds, sentences
from dynamo_mpi.observe.timeline_scale import Scale, scale_for
from dynamo_mpi.observe.timeline_svg import columns, part_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.observe.timeline_bars import Placed, Row
    from dynamo_mpi.observe.timeline_facts import PhaseFacts

LETTERS = {
    "start": "s",
    "environment": "e",
    "world": "w",
    "preflight": "p",
    "probe": "b",
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
    worlds, together = place(starts)
    tables = [_Table.of(world) for world in worlds]
    left = max(table.host_width + table.rank_width for table in tables) + 2
    noted = max(len(note) for table in tables for note in table.notes.values())
    room = max(_LEAST_WIDTH, width - left - noted - 1)
    shared = scale_for([world.rows for world in worlds], 0.0, float(room)) if together else None
    return "\n\n".join(
        "\n".join(
            [*_words(table), "", *_drawing(table, shared or scale_for([table.rows], 0.0, float(room)), left, room)]
        )
        for table in tables
    )


class _Table(NamedTuple):
    """One worker, with what its lines need."""

    start: Start
    rows: tuple[Row, ...]
    facts: tuple[PhaseFacts, ...]
    notes: dict[int, str]
    names: dict[int, str]
    host_width: int
    rank_width: int

    @classmethod
    def of(cls, world: Placed) -> _Table:
        facts = facts_of(world.rows)
        notes = {row.rank: _note(world.start, row, facts) for row in world.rows}
        host_width = min(_MOST_HOST, max((columns(row.host) for row in world.rows), default=0))
        names = {row.rank: str(row.rank) if world.start.layout else part_of(row) for row in world.rows}
        rank_width = max(map(len, names.values()), default=0)
        return cls(world.start, world.rows, facts, notes or {0: ""}, names, host_width, rank_width)


def _words(table: _Table) -> Iterator[str]:
    start = table.start
    if start.layout:
        yield f"{start.model}: {headline(start)}"
        yield f"{start.name}: {identity(start)}"
    else:
        yield start.name
    if failure := describe_failure(start):
        yield f"{start.outcome}: {failure}"
    yield from sentences(start, table.facts, table.rows)


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
    known = [f"{LETTERS.get(fact.phase, _OTHER)} {fact.phase}" for fact in table.facts]
    waits = [f"{_WAITS} waits for others"] if table.start.layout else []
    calm = [f"| {seconds(scale.calm[1] - scale.calm[0])} of serving"] if scale.calm else []
    yield " " * left + ", ".join([*known, *waits, *calm])


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
