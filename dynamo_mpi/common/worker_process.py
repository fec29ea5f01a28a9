# SPDX-License-Identifier: Apache-2.0
"""Signals to a worker's process that a file or a record names: never to another process that has got its id, and never to several."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_WORKER = b"dynamo_mpi.worker"
# a record has the time after Python's start; imports from a slow file system may come before it, nothing after it
_EARLIER_SECONDS, _LATER_SECONDS = 900.0, 5.0


def is_worker(pid: int, started: float) -> bool:
    """Return whether a process of this host is this user's, a rank of a worker, and began when it says.

    Args:
        pid: its process id; 0, 1 and negative numbers, which would mean several processes, are none.
        started: when it began, in seconds since 1970; 0 if that isn't known.
    """
    if pid < 2 or not started:
        return False
    folder = Path(f"/proc/{pid}")
    try:
        owner, words = folder.stat().st_uid, (folder / "cmdline").read_bytes()
        began = _boot() + int((folder / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return False
    is_then = started - _EARLIER_SECONDS <= began <= started + _LATER_SECONDS
    return owner == os.geteuid() and _WORKER in words.split(b"\0") and is_then


def signal_worker(pid: int, started: float, number: signal.Signals) -> bool:
    """Signal a process if it is the worker's, see `is_worker`; return whether it was."""
    with contextlib.suppress(OSError):  # it has exited
        if not hasattr(os, "pidfd_open"):  # a Python built for older kernels, such as conda's
            if is_worker(pid, started):
                os.kill(pid, number)
                return True
            return False
        descriptor = os.pidfd_open(pid) if pid > 1 else -1
        try:
            if is_worker(pid, started):
                signal.pidfd_send_signal(descriptor, number)
                return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return False


def _boot() -> float:
    """Return the machine's boot time, to which times in /proc are relative."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
