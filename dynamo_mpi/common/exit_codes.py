# SPDX-License-Identifier: Apache-2.0
"""The exit codes that launchers, batch scripts and operators may rely on.

Every rank of a world exits with the code of the root cause. Codes follow ``sysexits.h`` if it has a fitting one; 124 is the code of
``timeout(1)``, ``128 + n`` that of a shell for signal *n*. A batch script should requeue on ``TEMPORARY`` only.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes, grouped by who must act."""

    OK = 0
    USAGE = 64
    """Wrong flags, or a launch that cannot form the requested world."""
    DATA = 65
    """A file's content is invalid (YAML, JSON)."""
    NO_MODEL = 66
    """The model, or one of its files, cannot be read."""
    UNAVAILABLE = 69
    """etcd or NATS does not answer."""
    ENGINE = 70
    """The engine failed during load, first completion or serving."""
    TEMPORARY = 75
    """An external failure: start the worker again."""
    NOT_AUTHORISED = 77
    """A service refused the credentials."""
    ILLEGAL_LAYOUT = 78
    """The engine cannot run this model in this layout, or the two roles are incompatible."""
    DEADLINE = 124
    """A phase exceeded its time limit."""


def of_signal(number: int) -> int:
    """Return the exit code of a process that was ended by signal ``number``, as a shell reports it."""
    return 128 + number
