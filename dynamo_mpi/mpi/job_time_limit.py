# SPDX-License-Identifier: Apache-2.0
"""When the job's time limit is reached, and when the shutdown must begin before it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLE = "SLURM_JOB_END_TIME"
TIME_LIMIT_REACHED = "the launcher says that its time is nearly up (SIGUSR1): ending in order"
"""Why an end begins, where Slurm's ``--signal`` says so."""


class JobTimeLimit(NamedTuple):
    """The end of the job's time, as it stood when the job began: Slurm doesn't tell its processes of a later change.

    Args:
        end: seconds since 1970.
    """

    end: float

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> JobTimeLimit | None:
        """Return what Slurm says in ``SLURM_JOB_END_TIME``; None where it doesn't, as before its version 23."""
        text = environ.get(VARIABLE, "")
        return cls(float(text)) if text.isascii() and text.isdecimal() and 0 < int(text) < 2**33 else None

    def pause(self, needed: float, now: float) -> float | None:
        """Return the seconds from ``now`` until an end that needs ``needed`` seconds has to begin; None where it is too late for one."""
        pause = self.end - needed - now
        return pause if pause > 0 else None

    def too_late(self, needed: float, now: float) -> str:
        """Say that nothing will be ended in time."""
        return (
            f"the job's time ends at {self._clock} ({VARIABLE}), in {max(0.0, self.end - now):.0f} s, and an orderly end may take "
            f"{needed:.0f} s: what is in flight then is cut off"
        )

    def due(self, now: float) -> str:
        """Say why an end begins."""
        return f"the job's time ends at {self._clock} ({VARIABLE}), in {self.end - now:.0f} s: ending in order"

    @property
    def _clock(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.end))


def schedule_drain(
    environ: Mapping[str, str], needed: float, act: Callable[[str], object], warn: Callable[[str], None]
) -> Callable[[], None]:
    """Have ``act`` called so early that an orderly end comes before the job's time is up; a warning, where it is too late for that.

    Args:
        environ: where the time's end stands.
        needed: seconds that an orderly end may take.
        act: called from a thread with the reason.
        warn: logs a warning.

    Returns:
        What calls it off.
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
