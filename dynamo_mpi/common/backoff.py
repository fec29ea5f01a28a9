# SPDX-License-Identifier: Apache-2.0
"""Schedules reminders that something is still being waited for, at growing intervals."""

from __future__ import annotations

import time


class ReminderSchedule:
    """The reminders of one wait, which begins when this object is created.

    Args:
        first_seconds: seconds until the first reminder; each further interval is twice as long.
        longest_seconds: the longest interval between two reminders.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._began = time.monotonic()
        self._period, self._longest = first_seconds, longest_seconds
        self._next = self._began + first_seconds

    def due(self) -> float:
        """Return the seconds since the start if a reminder is due, otherwise 0."""
        now = time.monotonic()
        if now < self._next:
            return 0.0
        self._period = min(2 * self._period, self._longest)
        self._next = now + self._period
        return now - self._began
