# SPDX-License-Identifier: Apache-2.0
"""The phases of a rank's life, and how long each took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PHASES = ("environment", "world", "preflight", "probe", "load", "prove", "register", "serve", "drain", "exit")


class Span(NamedTuple):
    """One phase of one rank, in seconds.

    Args:
        phase: its name.
        began: since this rank began.
        own: how long this rank's own part took, after which it only waits for others; None as long as it is at it, or where nobody has said.
        lasted: how long all of it took; None as long as it goes on.
    """

    phase: str
    began: float
    own: float | None = None
    lasted: float | None = None


class Phases:
    """Records when each phase began and how long it took, in seconds of a clock that never jumps."""

    def __init__(self) -> None:
        self._born = time.monotonic()
        self.current = PHASES[0]
        self.durations: dict[str, float] = {}
        self.spans: list[Span] = []
        self._listeners: list[Callable[[str], None]] = []
        self._watchers: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[str], None], *, first: bool = False) -> None:
        """Call this with the name of each phase that begins, before the others where it is ``first``. It has to be quick."""
        self._listeners.insert(0 if first else len(self._listeners), listener)

    def watch(self, watcher: Callable[[], None]) -> None:
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
        if self.spans and self.spans[-1].phase == name and self.spans[-1].lasted is None:
            return
        self.current = name
        for listener in self._listeners:
            listener(name)
        if self.spans:
            self._finish(self.spans[-1].phase)
        self.spans.append(Span(name, self.age))
        self._changed()

    def own_part_done(self) -> None:
        """Say that this rank has done its own part of the current phase, and only waits for others now."""
        if self.spans and self.spans[-1].own is None:
            span = self.spans[-1]
            self.spans[-1] = span._replace(own=self.age - span.began)
            self._changed()

    def _finish(self, name: str) -> None:
        span = self.spans[-1]
        if span.lasted is None and span.phase == name:
            self.spans[-1] = span._replace(lasted=self.age - span.began)
            self._changed()

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher()

    @property
    def age(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._born
