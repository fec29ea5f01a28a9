# SPDX-License-Identifier: Apache-2.0
"""Schedules reminders that something is still being waited for, at growing intervals."""

from __future__ import annotations

import time


class News:
    """Of one wait, which begins with its construction.

    Args:
        first_seconds: until the first word; each further one takes twice as long.
        longest_seconds: between two words.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._began = time.monotonic()
        self._period, self._longest = first_seconds, longest_seconds
        self._next = self._began + first_seconds

    def due(self) -> float:
        """Return the seconds since the start when it is time for a word, else 0."""
        now = time.monotonic()
        if now < self._next:
            return 0.0
        self._period = min(2 * self._period, self._longest)
        self._next = now + self._period
        return now - self._began
