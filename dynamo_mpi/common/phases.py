# SPDX-License-Identifier: Apache-2.0
"""The phases of a rank, their durations, and the ranks' progress in them."""

from __future__ import annotations

import time
from contextlib import contextmanager

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PHASES = (
    *("environment", "mpi_init", "preflight", "hardware_check", "stage"),
    *("load", "warmup", "register", "serve", "drain", "exit"),
)
FORMER_PHASES = {"world": "mpi_init", "probe": "hardware_check", "prove": "warmup"}
"""What phases were called before 0.1; accepted in `DYN_MPI_FAULT`, and in records of older workers, until 0.2."""
PROCESS_START = "start"
"""The time before the first phase: Python's start and its imports."""


def phase_of_failure(world: str, own: str) -> str:
    """Return the phase that the report of a failure names: the world's, which is rank 0's, or the failed rank's own.

    Args:
        world: empty if it isn't known.
        own: counts then, and where that rank has left the preflight already and rank 0, which has sent the result, hasn't.
    """
    has_result = world == "preflight" and own in PHASES[PHASES.index(world) :]
    return own if has_result or not world else world


class Span(NamedTuple):
    """One phase of one rank, in seconds.

    Args:
        phase: its name.
        began: start, relative to this rank's start.
        local: duration of this rank's own part, after which it waits for other ranks; None while it runs, or if it isn't known.
        total: duration of the whole phase; None while it runs.
    """

    phase: str
    began: float
    local: float | None = None
    total: float | None = None


class RankTimings(NamedTuple):
    """One rank's phases, by rank 0's clock.

    Args:
        rank: its number.
        host: its host.
        began: when the rank's first phase began, in seconds since 1970.
        spans: its phases in order; the first is `PROCESS_START`, which begins before 0, if the system provides the process's start time.
        read: bytes that the process has read since its start, as last reported; None if its system doesn't provide it.
    """

    rank: int
    host: str
    began: float
    spans: tuple[Span, ...]
    read: int | None = None

    @property
    def current(self) -> Span | None:
        """The current phase; None if the rank has reported none."""
        return self.spans[-1] if self.spans else None


class PhaseProgress(NamedTuple):
    """The ranks' progress in the world's current phase.

    Args:
        phase: its name.
        done: number of ranks that have finished their own part.
        ranks: number of ranks of the world.
        slowest_rank: among unfinished ranks, one that hasn't begun, else the one that has read the fewest bytes, else the one that has been
            in the phase for the longest time; among all ranks if all have finished; None if no rank has reported.
        slowest_host: its host.
        seconds: how long that rank has been, or was, in the phase.
        read: bytes that all ranks together have read; None if not all report it.
        slowest_read: bytes that the slowest rank has read.
    """

    phase: str
    done: int
    ranks: int
    slowest_rank: int | None
    slowest_host: str | None
    seconds: float
    read: int | None = None
    slowest_read: int | None = None


class PhaseTracker:
    """Records the start and duration of each phase, in seconds of the monotonic clock.

    Attributes:
        ahead: on rank 0, the phase that the others begin with the preflight's result, until rank 0 begins one too; empty otherwise.
    """

    def __init__(self) -> None:
        self._born = time.monotonic()
        self.current, self.ahead = PHASES[0], ""
        self.durations: dict[str, float] = {}
        self.spans: list[Span] = []
        self._listeners: list[Callable[[str], None]] = []
        self._watchers: list[Callable[[], None]] = []

    def on_phase(self, listener: Callable[[str], None], *, first: bool = False) -> None:
        """Call ``listener`` with the name of each phase that begins, before other listeners if ``first``. It must be quick."""
        self._listeners.insert(0 if first else len(self._listeners), listener)

    def on_change(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` whenever `spans` has changed. It must be quick."""
        self._watchers.append(watcher)

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Run a phase; it stays the current one until the next begins, even if it fails."""
        self.begin(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[name] = time.monotonic() - start
            self._finish(name)

    def begin(self, name: str) -> None:
        """Begin a phase, which ends when the next begins; does nothing if it is the current one.

        Raises:
            ValueError: there is no such phase.
        """
        if name not in PHASES:
            raise ValueError(f"no phase is called {name!r}; there are {', '.join(PHASES)}")
        if self.spans and self.spans[-1].phase == name and self.spans[-1].total is None:
            return
        self.current, self.ahead = name, ""
        for listener in self._listeners:
            listener(name)
        if self.spans:
            self._finish(self.spans[-1].phase)
        self.spans.append(Span(name, self.age))
        self._changed()

    def mark_local_done(self) -> None:
        """Record that this rank has finished its own part of the current phase and waits for the others."""
        if self.spans and self.spans[-1].local is None:
            span = self.spans[-1]
            self.spans[-1] = span._replace(local=self.age - span.began)
            self._changed()

    def _finish(self, name: str) -> None:
        span = self.spans[-1]
        if span.total is None and span.phase == name:
            self.spans[-1] = span._replace(total=self.age - span.began)
            self._changed()

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher()

    @property
    def age(self) -> float:
        """Seconds since this object was created."""
        return time.monotonic() - self._born
