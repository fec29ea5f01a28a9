# SPDX-License-Identifier: Apache-2.0
"""This process and its host: name, signals, title, activity, limit of open files, exit without Python.

Every rank imports it before the preflight result.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

DRAIN_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1)
"""They ask for an orderly end, as ``--signal`` of a batch job does before its time limit. SIGUSR1 stays for one release: NCCL and a batch
job's submitter may use it themselves."""
SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT, *DRAIN_SIGNALS)


def host_name() -> str:
    """Return this node's short name, as in Slurm."""
    return os.uname().nodename.partition(".")[0]


def package_path(environ: Mapping[str, str]) -> str:
    """Return a PYTHONPATH with which another interpreter finds this package."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return os.pathsep.join(filter(None, (package, environ.get("PYTHONPATH"))))


def home_variable(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a ``HOME`` for an environment that lacks one, as a service's may: Open MPI doesn't start without it."""
    if environ.get("HOME"):
        return {}
    home = os.path.expanduser("~")
    # without an entry for this user; Open MPI only looks for a settings file there
    return {"HOME": "/" if home.startswith("~") else home}


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by a signal or a debugger."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


# in /proc/PID/stat, counted from the third field (proc(5)): the flags, among them the kernel's PF_EXITING, and the wait status
_FLAGS, _PF_EXITING, _STATUS = 6, 0x4, 49


# 128 and a signal's number follow
_MOST_OWN_CODE = 128


def exit_status(pid: int) -> int | None:
    """Return the wait status of a process that is exiting, or that its parent hasn't reaped yet; None if it isn't known.

    The kernel sets it before it closes the process's files. Other users' is hidden.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[_STATUS]) if int(fields[_FLAGS]) & _PF_EXITING else None
    except (OSError, IndexError, ValueError):
        return None


def ended_by_itself(status: int | None) -> bool:
    """Return whether a wait status is known, and is that of no signal: neither directly, nor as a shell, and our ranks, spell it."""
    return status is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) <= _MOST_OWN_CODE


# fields of /proc/PID/stat, counted from the third (proc(5)): start and end of the command line
_BEGIN, _END = 45, 46


def set_process_title(title: str) -> None:
    """Set the title, cut to the length of the original command line. Does not raise."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # the name before it may contain any character
            fields = file.read().rpartition(")")[2].split()
        begin, room = int(fields[_BEGIN]), int(fields[_END]) - int(fields[_BEGIN])
        if begin and room > 0:
            ctypes.memmove(begin, title.encode()[: room - 1].ljust(room, b"\0"), room)


_doing = ""


def set_activity(text: str) -> None:
    """Set the current activity; an empty text clears it. Costs next to nothing."""
    global _doing
    _doing = text


def activity() -> str:
    """Return the current activity."""
    return _doing


def format_frames(frame: FrameType | None) -> list[str]:
    """Return a thread's Python frames, the innermost first."""
    lines: list[str] = []
    while frame is not None:
        # without the source line: its file system may be what all ranks wait for
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return lines


SERVING_FILES = 256
"""Files that rank 0 opens besides the connections to the ranks: the engine's libraries, etcd, Dynamo's runtime, clients."""


def raise_nofile_limit(connections: int) -> None:
    """Raise this process's soft limit of open files if it is too low for ``connections``.

    Raises:
        UsageError: the hard limit is too low.
    """
    import resource  # on rank 0 alone

    needed = connections + SERVING_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        with contextlib.suppress(OSError, ValueError):  # then the kernel's limit is lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            return
    raise UsageError(
        f"rank 0 may have {hard} files open",
        expected=f"{needed}: a connection to each of the other ranks, and files for serving",
        fix=f"raise the limit on rank 0's node: ulimit -n {needed} where the ranks are started, LimitNOFILE= of slurmd's unit (srun's "
        "--propagate=NOFILE hands on the submitting shell's), --ulimit nofile of a container",
    )


def raise_nofile_limit_to_hard() -> None:
    """Raise this process's soft limit of open files to its hard limit, for the servers that it starts: clients use up their descriptors."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # then the kernel's limit is lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def forbid_core_dumps() -> None:
    """Let a crash of this process, and of its children, write no core file: it would hold the secrets that the process has read.

    The hard limit stays: ``prlimit --core=unlimited --pid PID`` allows one again.
    """
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


_SIGEV_THREAD = 2
_CLOCK_MONOTONIC = 1


class _Event(ctypes.Structure):
    """``struct sigevent`` of 64-bit glibc."""

    _fields_ = (
        ("value", ctypes.c_uint64),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


def hard_exit_after(seconds: float, code: int) -> None:
    """Exit with ``code`` after ``seconds``, whatever the process's threads do then. It can't be cancelled."""
    try:
        _exit_by_timer(seconds, code)
    except (OSError, AttributeError):
        # the default action of SIGALRM ends the process, though with another code
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))


def _exit_by_timer(seconds: float, code: int) -> None:
    """Let the C library call ``_exit(code)`` from a thread of its own.

    Raises:
        OSError: the timer can't be created.
        AttributeError: the C library has no timers.
    """
    library = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError):  # before glibc 2.34, timers are in a separate library
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    leave = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p)
    event = _Event(value=code, notify=_SIGEV_THREAD, function=leave)
    timer = ctypes.c_void_p()
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    fraction, whole = math.modf(max(seconds, 0.001))
    # interval, then first expiry, each in seconds and nanoseconds
    times = (ctypes.c_long * 4)(0, 0, int(whole), int(fraction * 1e9))
    if library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "timer_settime")
