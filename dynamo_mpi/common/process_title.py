# SPDX-License-Identifier: Apache-2.0
"""Sets the title that ``ps`` shows for a forked process."""

from __future__ import annotations

import contextlib
import ctypes

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
