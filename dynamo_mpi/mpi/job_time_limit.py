# SPDX-License-Identifier: Apache-2.0
"""When the job's time limit is reached, and when the shutdown must begin before it."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLE = "SLURM_JOB_END_TIME"


class JobTimeLimit(NamedTuple):
    """The job's time limit when the job began: Slurm doesn't notify its processes of later changes.

    Args:
        end: the time of the limit, in seconds since 1970.
    """

    end: float

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> JobTimeLimit | None:
        """Read it from Slurm's ``SLURM_JOB_END_TIME``; None if that isn't set, as before version 23."""
        text = environ.get(VARIABLE, "")
        return cls(float(text)) if text.isascii() and text.isdecimal() and 0 < int(text) < 2**33 else None

    def pause(self, needed: float, now: float) -> float | None:
        """Return the seconds from ``now`` until a shutdown of ``needed`` seconds must begin; None if it is too late."""
        pause = self.end - needed - now
        return pause if pause > 0 else None

    def too_late(self, needed: float, now: float) -> str:
        """Return the warning that there is not enough time for an orderly shutdown."""
        return (
            f"the job's time ends at {self._clock} ({VARIABLE}), in {max(0.0, self.end - now):.0f} s, and an orderly end may take "
            f"{needed:.0f} s: what is in flight then is cut off"
        )

    def due(self, now: float) -> str:
        """Return the reason of the shutdown."""
        return f"the job's time ends at {self._clock} ({VARIABLE}), in {self.end - now:.0f} s: ending in order"

    @property
    def _clock(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.end))


def time_limit_reached(number: int) -> str:
    """Return the reason of the shutdown that a signal requests, as Slurm's ``--signal`` does."""
    return f"the launcher says that its time is nearly up ({signal.Signals(number).name}): ending in order"


def schedule_drain(
    environ: Mapping[str, str], needed: float, act: Callable[[str], object], warn: Callable[[str], None]
) -> Callable[[], None]:
    """Schedule a call of ``act`` early enough for an orderly shutdown before the job's time limit; warn if it is too late.

    Args:
        environ: environment variables with the time limit.
        needed: seconds that an orderly shutdown may take.
        act: called from a thread with the reason.
        warn: logs a warning.

    Returns:
        A function that cancels the schedule.
    """
    limit, now = JobTimeLimit.of(environ), time.time()
    pause = None if limit is None else limit.pause(needed, now)
    if limit is not None and pause is None:
        warn(limit.too_late(needed, now))
    if limit is None or pause is None:
        return lambda: None
    timer = threading.Timer(pause, lambda: act(limit.due(time.time())))
    timer.daemon, timer.name = True, "time limit"
    timer.start()
    return timer.cancel
