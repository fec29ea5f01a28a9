# SPDX-License-Identifier: Apache-2.0
"""The phases of a rank's life, and how long each took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PHASES = ("environment", "world", "preflight", "load", "prove", "register", "serve", "drain", "exit")


class Phases:
    """Records when each phase began and how long it took, in seconds of a clock that never jumps."""

    def __init__(self) -> None:
        self._born = time.monotonic()
        self.current = PHASES[0]
        self.durations: dict[str, float] = {}
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None], *, first: bool = False) -> None:
        """Call this with the name of each phase that begins, before the others where it is ``first``. It has to be quick."""
        self._listeners.insert(0 if first else len(self._listeners), listener)

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Run a phase; it is the current one until the next begins, also when it fails."""
        if name not in PHASES:
            raise ValueError(f"no phase is called {name!r}; there are {', '.join(PHASES)}")
        self.current = name
        for listener in self._listeners:
            listener(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[name] = time.monotonic() - start

    @property
    def age(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._born
