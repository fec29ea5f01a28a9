# SPDX-License-Identifier: Apache-2.0
"""Bars out of phases: clipped so that every one can be drawn, whatever clocks have said. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.supervision.phases import RankSpans

# what clocks of one cluster differ by, and a message's way, is nothing to speak of
_TOLERANCE_SECONDS = 0.005
# a worker that was started again hours later would squeeze the others into nothing
_MOST_SPREAD = 4.0


class Bar(NamedTuple):
    """One phase of one rank, in seconds from the beginning of the picture.

    Args:
        phase: its name.
        begin: when it began.
        own_end: when the rank's own part was done, after which it waited for others.
        end: when it ended.
        told: whether the rank has said when its own part was done.
        open: whether it went on when this was written.
    """

    phase: str
    begin: float
    own_end: float
    end: float
    told: bool
    open: bool

    @property
    def own(self) -> float:
        """How long the rank's own part took, as far as is known."""
        return self.own_end - self.begin

    @property
    def waited(self) -> float:
        """How long it waited for others."""
        return self.end - self.own_end


class Row(NamedTuple):
    """One rank.

    Args:
        rank: its number.
        host: its node.
        bars: its phases, in order, none over another.
        clipped: how many of them were not as they should be.
    """

    rank: int
    host: str
    bars: tuple[Bar, ...]
    clipped: int


class Placed(NamedTuple):
    """A start on the picture's clock.

    Args:
        start: whose.
        rows: its ranks'.
        origin: the beginning of the picture, in seconds since 1970.
    """

    start: Start
    rows: tuple[Row, ...]
    origin: float


def rows_of(start: Start, origin: float) -> tuple[Row, ...]:
    """Return a worker's rows, in rank order.

    Args:
        start: the worker's.
        origin: the beginning of the picture, in seconds since 1970.
    """
    now = max(0.0, start.written - origin)
    return tuple(_row(rank, origin, now) for rank in sorted(start.ranks, key=lambda rank: rank.rank))


def _row(rank: RankSpans, origin: float, now: float) -> Row:
    bars: list[Bar] = []
    clipped, free = 0, 0.0
    for span in rank.spans:
        began = rank.began + span.began - origin
        ended = max(began, now) if span.lasted is None else began + span.lasted
        done = ended if span.own is None else began + span.own
        begin = max(began, free)
        end = max(begin, ended)
        own_end = min(max(begin, done), end)
        moved = max(begin - began, end - ended, done - ended if span.lasted is not None else 0.0, begin - done)
        clipped += moved > _TOLERANCE_SECONDS
        bars.append(Bar(span.phase, begin, own_end, end, span.own is not None, span.lasted is None))
        free = end
    return Row(rank.rank, rank.host, tuple(bars), clipped)


def place(starts: Sequence[Start]) -> tuple[list[Placed], bool]:
    """Lay all starts on one clock, or each on its own where they are too far apart; tell whether they are together.

    Args:
        starts: at least one.
    """
    origins = [start.origin for start in starts]
    alone = [Placed(start, rows_of(start, origin), origin) for start, origin in zip(starts, origins, strict=True)]
    lengths = [_started(world) for world in alone]
    first = min(origins)
    all_of_it = max(origin - first + length for origin, length in zip(origins, lengths, strict=True))
    if all_of_it > _MOST_SPREAD * max(lengths):
        return alone, False
    return [Placed(start, rows_of(start, first), first) for start in starts], True


def _started(world: Placed) -> float:
    """Return how long the start took, without what came after."""
    ready = world.start.ready
    if ready is not None:
        return max(0.001, ready - world.origin)
    return max([0.001, *(bar.end for row in world.rows for bar in row.bars)])
