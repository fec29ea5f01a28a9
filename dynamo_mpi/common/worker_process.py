# SPDX-License-Identifier: Apache-2.0
"""Signals to a worker's process that a file or a record names: never to another process that has got its id, and never to several."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from dynamo_mpi.common.light_typing import NamedTuple

_WORKER = b"dynamo_mpi.worker"
# an older record has only the time after Python's start; imports from a slow file system may come before it, nothing after it
_EARLIER_SECONDS, _LATER_SECONDS = 900.0, 5.0
# of /proc/PID/stat, counted from the third field (proc(5)): ticks from the boot to the process's start
_START = 19


class ProcessStart(NamedTuple):
    """When a process began, as its ready file or record says.

    Args:
        time: seconds since 1970; 0 if that isn't known.
        exact: see `process_start`; None from an older writer: then ``time`` decides, which fails if the clock was set since.
    """

    time: float
    exact: str | None = None


def process_start(pid: int) -> str | None:
    """Return the boot's id and the ticks from it to the process's start: ``BOOT_ID:TICKS``, whatever is done to the clock afterwards.

    None if the process or /proc doesn't exist.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}:{_start_ticks(pid)}"
    except (OSError, ValueError, IndexError):
        return None


def is_worker(pid: int, start: ProcessStart) -> bool:
    """Return whether a process of this host is this user's, a rank of a worker, and began when it says.

    Args:
        pid: its process id; 0, 1 and negative numbers, which would mean several processes, are none.
        start: when it began.
    """
    if pid < 2:
        return False
    folder = Path(f"/proc/{pid}")
    try:
        owner, words = folder.stat().st_uid, (folder / "cmdline").read_bytes()
        return owner == os.geteuid() and _WORKER in words.split(b"\0") and _began(pid, start)
    except (OSError, ValueError, IndexError):
        return False


def signal_worker(pid: int, start: ProcessStart, number: signal.Signals) -> bool:
    """Signal a process if it is the worker's, see `is_worker`; return whether it was."""
    with contextlib.suppress(OSError):  # it has exited
        if not hasattr(os, "pidfd_open"):  # a Python built for older kernels, such as conda's
            if is_worker(pid, start):
                os.kill(pid, number)
                return True
            return False
        descriptor = os.pidfd_open(pid) if pid > 1 else -1
        try:
            if is_worker(pid, start):
                signal.pidfd_send_signal(descriptor, number)
                return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return False


def _began(pid: int, start: ProcessStart) -> bool:
    if start.exact:
        return start.exact == process_start(pid)
    began = _boot() + _start_ticks(pid) / os.sysconf("SC_CLK_TCK")
    return bool(start.time) and start.time - _EARLIER_SECONDS <= began <= start.time + _LATER_SECONDS


def _start_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[_START])


def _boot() -> float:
    """Return the machine's boot time, to which times in /proc are relative."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
