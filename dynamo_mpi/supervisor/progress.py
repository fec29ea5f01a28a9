# SPDX-License-Identifier: Apache-2.0
"""The roll of a world: what rank 0 knows of every rank's phases, for whoever shows it (progress, record, metrics, timeline)."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.phases import PHASES, PROCESS_START, PhaseProgress, RankTimings, Span
from dynamo_mpi.supervisor.heartbeat_protocol import WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.phases import PhaseTracker

_FIELDS = 4
_MOST_SPANS = 64


class ProgressTracker:
    """Keeps the roll. Thread-safe.

    Args:
        hosts: each rank's node.
        phases: rank 0's own.
    """

    def __init__(self, hosts: Sequence[str], phases: PhaseTracker) -> None:
        self._hosts, self._phases = hosts, phases
        self._lock = threading.Lock()
        self._told: dict[int, tuple[float, tuple[Span, ...], int | None]] = {}
        # how much later it is here than on that rank, less the time that a message takes
        self._offsets: dict[int, float] = {}
        self._born_before = _age_before(phases)

    def update(self, rank: int, body: bytes) -> None:
        """Take note of what a rank has told with `pack_spans`.

        Raises:
            WireError: it isn't that.
        """
        now = time.time()
        sent, began, spans, read = _unpack_spans(body)
        with self._lock:
            # a message is never early, so of all the least late one tells the clocks' difference best
            self._offsets[rank] = min(now - sent, self._offsets.get(rank, now - sent))
            self._told[rank] = (began, spans, read)

    def ranks(self) -> list[RankTimings]:
        """Return what is known of every rank, in rank order."""
        with self._lock:
            told, offsets = dict(self._told), dict(self._offsets)
        own = (time.time() - self._phases.age, _with_start(self._phases.spans, self._born_before), bytes_read())
        return [RankTimings(0, self._hosts[0], *own)] + [
            RankTimings(rank, host, told[rank][0] + offsets[rank], *told[rank][1:])
            if rank in told
            else RankTimings(rank, host, 0.0, ())
            for rank, host in enumerate(self._hosts)
            if rank
        ]

    def progress(self) -> PhaseProgress:
        """Say how far the ranks are."""
        return progress_of(self._phases.current, self.ranks(), time.time())


def progress_of(phase: str, ranks: Sequence[RankTimings], now: float) -> PhaseProgress:
    """Say how far ranks are. Pure.

    Args:
        phase: that the world is in.
        ranks: all.
        now: seconds since 1970, by rank 0's clock.
    """
    behind: list[RankTimings] = []
    at_it: list[tuple[float, int, RankTimings]] = []
    through: list[tuple[float, int, RankTimings]] = []
    done = 0
    for rank in ranks:
        entry = _entry(phase, rank, now)
        done += entry.is_through
        if entry.seconds is not None:
            (through if entry.is_through else at_it).append((entry.seconds, -rank.rank, rank))
        elif not entry.is_through:
            behind.append(rank)
    if not at_it and not through:
        return PhaseProgress(phase, done, len(ranks), None, None, 0.0)
    if behind:
        # it can't have been expected there for longer than the first one is
        slowest = behind[0]
        seconds = max(now - rank.began - _begin(phase, rank) for _, _, rank in at_it + through)
    elif at_it and all(rank.read is not None for _, _, rank in at_it):
        seconds, _, slowest = min(at_it, key=lambda entry: (entry[2].read or 0, -entry[0], -entry[1]))
    else:
        seconds, _, slowest = max(at_it or through)
    known = [rank.read for rank in ranks if rank.read is not None]
    read = sum(known) if len(known) == len(ranks) else None
    return PhaseProgress(
        phase,
        done,
        len(ranks),
        slowest.rank,
        slowest.host,
        max(0.0, seconds),
        read,
        None if read is None else slowest.read,
    )


class _Entry(NamedTuple):
    """How far one rank is in a phase; ``seconds`` are None where it hasn't been in it."""

    is_through: bool
    seconds: float | None


def _entry(phase: str, rank: RankTimings, now: float) -> _Entry:
    current = rank.current
    is_through, seconds = current is not None and _place(current.phase) > PHASES.index(phase), None
    for span in rank.spans:
        if span.phase == phase:
            seconds = span.local if span.local is not None else span.total
            is_through |= seconds is not None
            if seconds is None:
                seconds = now - rank.began - span.began
    return _Entry(is_through, seconds)


def _begin(phase: str, rank: RankTimings) -> float:
    return min(span.began for span in rank.spans if span.phase == phase)


def bytes_read() -> int | None:
    """Return how many bytes this process has read, from files or from a disk by mapping them; None where the system doesn't tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            counts = dict(line.split(": ") for line in file)
        return max(int(counts["rchar"]), int(counts["read_bytes"]))
    except (OSError, ValueError, KeyError):
        return None


def pack_spans(phases: PhaseTracker) -> bytes:
    """Encode this rank's spans, with what its clock says now, and how much it has read."""
    now, read = time.time(), bytes_read()
    values = [repr(now), repr(now - phases.age), "" if read is None else str(read)]
    for span in _with_start(phases.spans, _age_before(phases)):
        values += [
            span.phase,
            repr(span.began),
            *("" if value is None else repr(value) for value in (span.local, span.total)),
        ]
    return encode_strings(values)


def _unpack_spans(body: bytes) -> tuple[float, float, tuple[Span, ...], int | None]:
    try:
        sent, began, read, *rest = decode_strings(body)
        if len(rest) % _FIELDS or len(rest) > _FIELDS * _MOST_SPANS:
            raise ValueError
        spans = tuple(
            Span(phase, float(start), float(own) if own else None, float(lasted) if lasted else None)
            for phase, start, own, lasted in zip(*(rest[field::_FIELDS] for field in range(_FIELDS)), strict=True)
        )
        known = all(_place(span.phase) >= -1 for span in spans)
        if not known:
            raise ValueError
        return float(sent), float(began), spans, int(read) if read else None
    except ValueError:
        raise WireError("no spans") from None


def _place(phase: str) -> int:
    """Return a phase's place in a life.

    Raises:
        ValueError: there is no such phase.
    """
    return -1 if phase == PROCESS_START else PHASES.index(phase)


def _with_start(spans: Sequence[Span], before: float) -> tuple[Span, ...]:
    return (Span(PROCESS_START, -before, None, before), *spans) if before > 0 else tuple(spans)


def _age_before(phases: PhaseTracker) -> float:
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
