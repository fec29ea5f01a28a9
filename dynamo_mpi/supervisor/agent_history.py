# SPDX-License-Identifier: Apache-2.0
"""The phases of a world and the signals that its ranks got, as its node agent records them."""

from __future__ import annotations

import time

# a launcher that ends the ranks kills those that are left after some seconds
_SIGNALLED_SECONDS = 5.0


class History:
    """Records phases and signals; times are seconds of the monotonic clock.

    Args:
        size: ranks of the world.

    Attributes:
        phase: the world's phase, which is rank 0's; empty if it isn't known.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.phase = ""
        self._phases: list[tuple[float, str]] = []
        self._signalled_at: dict[int, float] = {}

    def note_phase(self, phase: str) -> None:
        """Record that a phase begins."""
        self.phase = phase
        self._phases.append((time.monotonic(), phase))

    def phase_at(self, when: float) -> str:
        """Return the phase at a time. Later phases may be consequences: after a death, the launcher's signal to rank 0 starts a drain."""
        before = [phase for since, phase in self._phases if since <= when]
        return before[-1] if before else self.phase

    def note_signal(self, rank: int) -> None:
        """Record that a rank got a signal to end."""
        self._signalled_at[rank] = time.monotonic()

    def was_ended_by_launcher(self, rank: int) -> bool:
        """Return whether the launcher was asked to end a rank that has exited: it signals all ranks before it kills them."""
        now = time.monotonic()
        recent = [other for other, at in self._signalled_at.items() if now - at < _SIGNALLED_SECONDS]
        # a signal to rank 0 alone asks for a drain
        return rank in recent and (rank != 0 or self._size == 1 or len(recent) > 1)
