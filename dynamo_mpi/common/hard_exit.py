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
    """End this process with ``code`` in ``seconds``, whatever its threads are doing then. There is no way back."""
    try:
        _exit_by_timer(seconds, code)
    except (OSError, AttributeError):
        # the kernel's default for an alarm: the process ends, if not with our code
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))


def _exit_by_timer(seconds: float, code: int) -> None:
    """Have the C library call ``_exit(code)`` from a thread of its own.

    Raises:
        OSError: it can't.
        AttributeError: it has no timers.
    """
    library = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError):  # before glibc 2.34 they are in a library of their own
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    leave = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p)
    event = _Event(value=code, notify=_SIGEV_THREAD, function=leave)
    timer = ctypes.c_void_p()
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    fraction, whole = math.modf(max(seconds, 0.001))
    # interval, then the first time, each in seconds and nanoseconds
    times = (ctypes.c_long * 4)(0, 0, int(whole), int(fraction * 1e9))
    if library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "timer_settime")
