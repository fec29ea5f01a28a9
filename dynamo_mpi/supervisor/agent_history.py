# SPDX-License-Identifier: Apache-2.0
"""What a node agent remembers of its world: its phases, and which ranks got a signal to end."""

from __future__ import annotations

import time

# a launcher that is to end the ranks kills those that don't end after some seconds
_SIGNALLED_SECONDS = 5.0


class History:
    """Times are those of the monotonic clock.

    Args:
        size: ranks of the world.

    Attributes:
        phase: the world's, so rank 0's; empty where it isn't known.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.phase = ""
        self._phases: list[tuple[float, str]] = []
        self._signalled_at: dict[int, float] = {}

    def note_phase(self, phase: str) -> None:
        """A phase begins."""
        self.phase = phase
        self._phases.append((time.monotonic(), phase))

    def phase_at(self, when: float) -> str:
        """Return the phase at a time: the signal by which a launcher ends rank 0 after a death begins a drain."""
        before = [phase for since, phase in self._phases if since <= when]
        return before[-1] if before else self.phase

    def note_signal(self, rank: int) -> None:
        """A rank got a signal to end."""
        self._signalled_at[rank] = time.monotonic()

    def was_ended_by_launcher(self, rank: int) -> bool:
        """Return whether the end of a rank follows from an order to its launcher, which sends a signal to all ranks before it kills them."""
        now = time.monotonic()
        recent = [other for other, at in self._signalled_at.items() if now - at < _SIGNALLED_SECONDS]
        # rank 0 alone is asked to drain
        return rank in recent and (rank != 0 or self._size == 1 or len(recent) > 1)
