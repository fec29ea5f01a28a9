# SPDX-License-Identifier: Apache-2.0
"""Tracks every rank's phases on rank 0, for the progress log, the worker record, metrics and the timeline."""

from __future__ import annotations

import os
import threading
import time

from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.phases import PHASES, PROCESS_START, PhaseProgress, RankTimings, Span
from dynamo_mpi.supervisor.heartbeat_protocol import WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.phases import PhaseTracker

_FIELDS = 4
_MAX_SPANS = 64


class ProgressTracker:
    """Keeps the phases of every rank. Thread-safe.

    Args:
        hosts: each rank's host.
        phases: rank 0's phases.
    """

    def __init__(self, hosts: Sequence[str], phases: PhaseTracker) -> None:
        self._hosts, self._phases = hosts, phases
        self._lock = threading.Lock()
        self._reported: dict[int, tuple[float, tuple[Span, ...], int | None]] = {}
        # clock difference to each rank, including the fastest message's transfer time
        self._offsets: dict[int, float] = {}
        self._age_before_start = _age_before(phases)

    def update(self, rank: int, body: bytes) -> None:
        """Store what a rank sent with `pack_timings`.

        Raises:
            WireError: the body is invalid.
        """
        now = time.time()
        sent_at, began, spans, read = _unpack_timings(body)
        with self._lock:
            # the message with the least delay gives the best estimate of the clocks' difference
            self._offsets[rank] = min(now - sent_at, self._offsets.get(rank, now - sent_at))
            self._reported[rank] = (began, spans, read)

    def ranks(self) -> list[RankTimings]:
        """Return every rank's timings, in rank order."""
        with self._lock:
            reported, offsets = dict(self._reported), dict(self._offsets)
        own = (time.time() - self._phases.age, _with_start(self._phases.spans, self._age_before_start), bytes_read())
        return [RankTimings(0, self._hosts[0], *own)] + [
            RankTimings(rank, host, reported[rank][0] + offsets[rank], *reported[rank][1:])
            if rank in reported
            else RankTimings(rank, host, 0.0, ())
            for rank, host in enumerate(self._hosts)
            if rank
        ]

    def progress(self) -> PhaseProgress:
        """Return the ranks' progress in the current phase."""
        return progress_of(self._phases.current, self.ranks(), time.time())


def progress_of(phase: str, ranks: Sequence[RankTimings], now: float) -> PhaseProgress:
    """Return ranks' progress in a phase. Pure.

    Args:
        phase: the world's phase.
        ranks: the timings of all ranks.
        now: seconds since 1970 by rank 0's clock.
    """
    not_started: list[RankTimings] = []
    in_phase: list[tuple[float, int, RankTimings]] = []
    finished: list[tuple[float, int, RankTimings]] = []
    done = 0
    for rank in ranks:
        entry = _entry(phase, rank, now)
        done += entry.is_finished
        if entry.seconds is not None:
            (finished if entry.is_finished else in_phase).append((entry.seconds, -rank.rank, rank))
        elif not entry.is_finished:
            not_started.append(rank)
    if not in_phase and not finished:
        return PhaseProgress(phase, done, len(ranks), None, None, 0.0)
    if not_started:
        # a missing rank is late at most as long as the first rank has been in the phase
        slowest = not_started[0]
        seconds = max(now - rank.began - _begin_of(phase, rank) for _, _, rank in in_phase + finished)
    elif in_phase and all(rank.read is not None for _, _, rank in in_phase):
        seconds, _, slowest = min(in_phase, key=lambda entry: (entry[2].read or 0, -entry[0], -entry[1]))
    else:
        seconds, _, slowest = max(in_phase or finished)
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
    """A rank's progress in a phase; ``seconds`` is None if it has not entered the phase."""

    is_finished: bool
    seconds: float | None


def _entry(phase: str, rank: RankTimings, now: float) -> _Entry:
    current = rank.current
    is_finished, seconds = current is not None and _phase_index(current.phase) > PHASES.index(phase), None
    for span in rank.spans:
        if span.phase == phase:
            seconds = span.local if span.local is not None else span.total
            is_finished |= seconds is not None
            if seconds is None:
                seconds = now - rank.began - span.began
    return _Entry(is_finished, seconds)


def _begin_of(phase: str, rank: RankTimings) -> float:
    return min(span.began for span in rank.spans if span.phase == phase)


def bytes_read() -> int | None:
    """Return how many bytes this process has read from files or mapped from a disk; None if the system doesn't provide it."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            counts = dict(line.split(": ") for line in file)
        return max(int(counts["rchar"]), int(counts["read_bytes"]))
    except (OSError, ValueError, KeyError):
        return None


def pack_timings(phases: PhaseTracker) -> bytes:
    """Encode this rank's spans, its clock and the bytes it has read."""
    now, read = time.time(), bytes_read()
    values = [repr(now), repr(now - phases.age), "" if read is None else str(read)]
    for span in _with_start(phases.spans, _age_before(phases)):
        values += [
            span.phase,
            repr(span.began),
            *("" if value is None else repr(value) for value in (span.local, span.total)),
        ]
    return encode_strings(values)


def _unpack_timings(body: bytes) -> tuple[float, float, tuple[Span, ...], int | None]:
    try:
        sent_at, began, read, *rest = decode_strings(body)
        if len(rest) % _FIELDS or len(rest) > _FIELDS * _MAX_SPANS:
            raise ValueError
        spans = tuple(
            Span(phase, float(start), float(own) if own else None, float(lasted) if lasted else None)
            for phase, start, own, lasted in zip(*(rest[field::_FIELDS] for field in range(_FIELDS)), strict=True)
        )
        known = all(_phase_index(span.phase) >= -1 for span in spans)
        if not known:
            raise ValueError
        return float(sent_at), float(began), spans, int(read) if read else None
    except ValueError:
        raise WireError("invalid TIMINGS frame") from None


def _phase_index(phase: str) -> int:
    """Return a phase's index.

    Raises:
        ValueError: there is no such phase.
    """
    return -1 if phase == PROCESS_START else PHASES.index(phase)


def _with_start(spans: Sequence[Span], before: float) -> tuple[Span, ...]:
    return (Span(PROCESS_START, -before, None, before), *spans) if before > 0 else tuple(spans)


def _age_before(phases: PhaseTracker) -> float:
    """Return the seconds between this process's start and its first phase; 0 if the system doesn't provide it."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # after the name, which may contain any character; field 22 of proc(5)
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    # both are relative to the system's start
    born = ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born - phases.age)
