# SPDX-License-Identifier: Apache-2.0
"""Exits without Python: mpi4py's ``Abort`` holds the GIL, and may never return if the launcher can't be reached."""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal

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
