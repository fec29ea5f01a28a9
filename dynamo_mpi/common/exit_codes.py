# SPDX-License-Identifier: Apache-2.0
"""The exit codes that launchers, batch scripts and operators may rely on.

Every rank of a world leaves with the code of the first cause. Codes follow ``sysexits.h`` where it has a
fitting one; 124 is ``timeout(1)``'s, ``128 + n`` a shell's for signal *n*. A batch script requeues on
``TEMPORARY`` only.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process exits with, by who has to act."""

    OK = 0
    USAGE = 64
    """Wrong flags, or a launch that cannot form the world that was asked for."""
    DATA = 65
    """A file was read but is not what it should be (YAML, JSON)."""
    NO_MODEL = 66
    """The model, or a file it needs, cannot be read."""
    UNAVAILABLE = 69
    """etcd or NATS does not answer."""
    ENGINE = 70
    """The engine failed while loading, proving or serving."""
    TEMPORARY = 75
    """Nothing is wrong with the request: start again."""
    NOT_AUTHORISED = 77
    """A service refused the credentials."""
    ILLEGAL_LAYOUT = 78
    """The engine cannot run this model in this layout, or the two roles do not fit."""
    DEADLINE = 124
    """A phase did not end in its time."""


def of_signal(number: int) -> int:
    """Return the exit code of a process that was ended by signal ``number``, as a shell reports it."""
    return 128 + number
