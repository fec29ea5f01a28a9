# SPDX-License-Identifier: Apache-2.0
"""The phases of a rank, their durations, and the ranks' progress in them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PHASES = ("environment", "world", "preflight", "probe", "load", "prove", "register", "serve", "drain", "exit")
PROCESS_START = "start"
"""What comes before the first phase: Python's start, and what it imports."""


class Span(NamedTuple):
    """One phase of one rank, in seconds.

    Args:
        phase: its name.
        began: since this rank began.
        local: how long this rank's own part took, after which it waits for other ranks; None while it lasts, or if it isn't known.
        total: how long all of it took; None as long as it goes on.
    """

    phase: str
    began: float
    local: float | None = None
    total: float | None = None


class RankTimings(NamedTuple):
    """One rank's phases, by rank 0's clock.

    Args:
        rank: its number.
        host: its node.
        began: when the rank's first phase began, in seconds since 1970.
        spans: its phases, in order; the first is `PROCESS_START` where the system tells when the process began, and begins before 0.
        read: bytes that the process has read since it began, when last heard of; None where its system doesn't tell.
    """

    rank: int
    host: str
    began: float
    spans: tuple[Span, ...]
    read: int | None = None

    @property
    def current(self) -> Span | None:
        """The phase that it is in; None where it has told none."""
        return self.spans[-1] if self.spans else None


class PhaseProgress(NamedTuple):
    """How far the ranks are in the phase that the world is in.

    Args:
        phase: its name.
        done: ranks that are through with their own part of it.
        ranks: of the world.
        slowest_rank: of those that aren't through, one that hasn't begun, else the one that has read the least, else the one that has been
            at it for longest; of all, where all are through; None where nobody has said.
        slowest_host: its node.
        seconds: how long that one has been, or was, at it.
        read: bytes that all ranks together have read; None where they don't all tell.
        slowest_read: bytes that the slowest one has.
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
    """Records when each phase began and how long it took, in seconds of a clock that never jumps."""

    def __init__(self) -> None:
        self._born = time.monotonic()
        self.current = PHASES[0]
        self.durations: dict[str, float] = {}
        self.spans: list[Span] = []
        self._listeners: list[Callable[[str], None]] = []
        self._watchers: list[Callable[[], None]] = []

    def on_phase(self, listener: Callable[[str], None], *, first: bool = False) -> None:
        """Call this with the name of each phase that begins, before the others where it is ``first``. It has to be quick."""
        self._listeners.insert(0 if first else len(self._listeners), listener)

    def on_change(self, watcher: Callable[[], None]) -> None:
        """Call this whenever `spans` has changed. It has to be quick."""
        self._watchers.append(watcher)

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Run a phase; it is the current one until the next begins, also when it fails."""
        self.begin(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[name] = time.monotonic() - start
            self._finish(name)

    def begin(self, name: str) -> None:
        """Begin a phase, which ends when the next begins; one that is going on goes on.

        Raises:
            ValueError: there is no such phase.
        """
        if name not in PHASES:
            raise ValueError(f"no phase is called {name!r}; there are {', '.join(PHASES)}")
        if self.spans and self.spans[-1].phase == name and self.spans[-1].total is None:
            return
        self.current = name
        for listener in self._listeners:
            listener(name)
        if self.spans:
            self._finish(self.spans[-1].phase)
        self.spans.append(Span(name, self.age))
        self._changed()

    def mark_local_done(self) -> None:
        """Say that this rank has done its own part of the current phase, and only waits for others now."""
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
        """Seconds since this object was made."""
        return time.monotonic() - self._born
