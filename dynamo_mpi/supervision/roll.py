# SPDX-License-Identifier: Apache-2.0
"""The roll of a world: what rank 0 knows of every rank's phases, for whoever shows it (progress, record, metrics, timeline)."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.fields import pack, unpack
from dynamo_mpi.supervision.liveness_wire import WireError
from dynamo_mpi.supervision.phases import PHASES, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.supervision.phases import Phases

_FIELDS = 4
_MOST_SPANS = 64
# what happens before the first phase: Python's start, and what it imports
BEFORE = "start"


class RankSpans(NamedTuple):
    """One rank's phases, by rank 0's clock.

    Args:
        rank: its number.
        host: its node.
        began: when the rank's first phase began, in seconds since 1970.
        spans: its phases, in order; the first is `BEFORE` where the system tells when the process began, and begins before 0.
    """

    rank: int
    host: str
    began: float
    spans: tuple[Span, ...]

    @property
    def current(self) -> Span | None:
        """The phase that it is in; None where it has told none."""
        return self.spans[-1] if self.spans else None


class Progress(NamedTuple):
    """How far the ranks are in the phase that the world is in.

    Args:
        phase: its name.
        done: ranks that are through with their own part of it.
        ranks: of the world.
        slowest_rank: of those that aren't through, the one that has been at it for longest; of all, where all are; None where
            nobody has said.
        slowest_host: its node.
        seconds: how long that one has been, or was, at it.
    """

    phase: str
    done: int
    ranks: int
    slowest_rank: int | None
    slowest_host: str | None
    seconds: float


class Roll:
    """Keeps the roll. Thread-safe.

    Args:
        hosts: each rank's node.
        phases: rank 0's own.
    """

    def __init__(self, hosts: Sequence[str], phases: Phases) -> None:
        self._hosts, self._phases = hosts, phases
        self._lock = threading.Lock()
        self._told: dict[int, tuple[float, tuple[Span, ...]]] = {}
        # how much later it is here than on that rank, less the time that a message takes
        self._offsets: dict[int, float] = {}
        self._born_before = _age_before(phases)

    def note(self, rank: int, body: bytes) -> None:
        """Take note of what a rank has told with `pack_spans`.

        Raises:
            WireError: it isn't that.
        """
        now = time.time()
        sent, began, spans = _unpack_spans(body)
        with self._lock:
            # a message is never early, so of all the least late one tells the clocks' difference best
            self._offsets[rank] = min(now - sent, self._offsets.get(rank, now - sent))
            self._told[rank] = (began, spans)

    def ranks(self) -> list[RankSpans]:
        """Return what is known of every rank, in rank order."""
        with self._lock:
            told, offsets = dict(self._told), dict(self._offsets)
        own = (time.time() - self._phases.age, _with_start(self._phases.spans, self._born_before))
        return [RankSpans(0, self._hosts[0], *own)] + [
            RankSpans(rank, host, told[rank][0] + offsets[rank], told[rank][1])
            if rank in told
            else RankSpans(rank, host, 0.0, ())
            for rank, host in enumerate(self._hosts)
            if rank
        ]

    def progress(self) -> Progress:
        """Say how far the ranks are."""
        return progress_of(self._phases.current, self.ranks(), time.time())


def progress_of(phase: str, ranks: Sequence[RankSpans], now: float) -> Progress:
    """Say how far ranks are. Pure.

    Args:
        phase: that the world is in.
        ranks: all.
        now: seconds since 1970, by rank 0's clock.
    """
    place = PHASES.index(phase)
    done, at_it, through = 0, [], []
    for rank in ranks:
        seconds = None
        for span in rank.spans:
            if span.phase == phase:
                seconds = span.own if span.own is not None else span.lasted
                if seconds is None:
                    at_it.append((now - rank.began - span.began, -rank.rank, rank))
                else:
                    through.append((seconds, -rank.rank, rank))
        current = rank.current
        done += seconds is not None or (current is not None and _place(current.phase) > place)
    if not at_it and not through:
        return Progress(phase, done, len(ranks), None, None, 0.0)
    seconds, _, slowest = max(at_it or through)
    return Progress(phase, done, len(ranks), slowest.rank, slowest.host, max(0.0, seconds))


def pack_spans(phases: Phases) -> bytes:
    """Encode this rank's spans, with what its clock says now."""
    now = time.time()
    values = [repr(now), repr(now - phases.age)]
    for span in _with_start(phases.spans, _age_before(phases)):
        values += [
            span.phase,
            repr(span.began),
            *("" if value is None else repr(value) for value in (span.own, span.lasted)),
        ]
    return pack(values)


def _unpack_spans(body: bytes) -> tuple[float, float, tuple[Span, ...]]:
    try:
        sent, began, *rest = unpack(body)
        if len(rest) % _FIELDS or len(rest) > _FIELDS * _MOST_SPANS:
            raise ValueError
        spans = tuple(
            Span(phase, float(start), float(own) if own else None, float(lasted) if lasted else None)
            for phase, start, own, lasted in zip(*(rest[field::_FIELDS] for field in range(_FIELDS)), strict=True)
        )
        known = all(_place(span.phase) >= -1 for span in spans)
        if not known:
            raise ValueError
        return float(sent), float(began), spans
    except ValueError:
        raise WireError("no spans") from None


def _place(phase: str) -> int:
    """Return a phase's place in a life.

    Raises:
        ValueError: there is no such phase.
    """
    return -1 if phase == BEFORE else PHASES.index(phase)


def _with_start(spans: Sequence[Span], before: float) -> tuple[Span, ...]:
    return (Span(BEFORE, -before, None, before), *spans) if before > 0 else tuple(spans)


def _age_before(phases: Phases) -> float:
    """Return how many seconds this process was there before its first phase; 0 where the system doesn't tell."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # behind the name, which may hold anything; field 22 of proc(5)
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    # both count from the system's start
    born = ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born - phases.age)
