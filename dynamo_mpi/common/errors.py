# SPDX-License-Identifier: Apache-2.0
"""The errors that a user may get, and the exit codes that launchers, batch scripts and operators may rely on.

Each error states the problem, what is expected, and the fix.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes, grouped by who must act.

    Every rank of a world exits with the code of the root cause. Codes follow ``sysexits.h`` if it has a fitting one; 124 is the code of
    ``timeout(1)``, ``128 + n`` that of a shell for signal *n*. A batch script should requeue on ``TEMPORARY`` only.
    """

    OK = 0
    USAGE = 64
    """Wrong flags, or a launch that cannot form the requested world."""
    DATA = 65
    """A file cannot be used: its content is invalid (YAML, JSON), or a file of settings cannot be read or differs between ranks."""
    NO_MODEL = 66
    """The model, or one of its files, cannot be read, is damaged, or differs between nodes; or a node has not the image or a mount."""
    UNAVAILABLE = 69
    """etcd or NATS does not answer, has ended, or cannot be started; or a script could not install what it needs."""
    ENGINE = 70
    """The engine failed during load, first completion or serving; or the frontend has ended, or a file system has failed."""
    TEMPORARY = 75
    """An external failure: start the worker again."""
    NOT_AUTHORISED = 77
    """A service refused the credentials, or a file or folder that is needed belongs to another user."""
    ILLEGAL_LAYOUT = 78
    """The engine cannot run this model in this layout, or the two roles are incompatible."""
    DEADLINE = 124
    """A phase exceeded its time limit."""


MISTAKES = frozenset(
    {ExitCode.USAGE, ExitCode.DATA, ExitCode.NO_MODEL, ExitCode.NOT_AUTHORISED, ExitCode.ILLEGAL_LAYOUT}
)
"""Codes with which the same command would end again; the process has printed the reason."""


def of_signal(number: int) -> int:
    """Return the exit code of a process that was ended by signal ``number``, as a shell reports it."""
    return 128 + number


class DynamoMpiError(Exception):
    """Base class of all errors that a user may get.

    Args:
        problem: one sentence without a full stop.
        expected: what is expected instead.
        fix: what the user can do, with a command if there is one.
    """

    exit_code: ExitCode = ExitCode.ENGINE

    def __init__(self, problem: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)

    def plain(self) -> dict[str, int | str]:
        """Return the error as JSON values, for programs."""
        return {"exit_code": int(self.exit_code), "found": self.problem, "needed": self.expected, "fix": self.fix}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.expected, self.fix)


def _rebuild(kind: type[DynamoMpiError], problem: str, expected: str, fix: str) -> DynamoMpiError:
    return kind(problem, expected=expected, fix=fix)


class UsageError(DynamoMpiError):
    """Wrong flags or settings."""

    exit_code = ExitCode.USAGE


class LaunchError(DynamoMpiError):
    """The launcher started something other than the requested world."""

    exit_code = ExitCode.USAGE


class ConfigFileError(DynamoMpiError):
    """A file cannot be read, or its content is invalid."""

    exit_code = ExitCode.DATA


class ModelNotFoundError(DynamoMpiError):
    """The model directory or one of its files cannot be read, or is damaged."""

    exit_code = ExitCode.NO_MODEL


class DiscoveryError(DynamoMpiError):
    """etcd or NATS does not answer, or cannot be started."""

    exit_code = ExitCode.UNAVAILABLE


class AuthorizationError(DynamoMpiError):
    """etcd or NATS refused the credentials, or a file or folder belongs to another user."""

    exit_code = ExitCode.NOT_AUTHORISED


class EngineError(DynamoMpiError):
    """The engine failed."""

    exit_code = ExitCode.ENGINE


class RetryableError(DynamoMpiError):
    """An external failure; starting the worker again may help."""

    exit_code = ExitCode.TEMPORARY


class LayoutError(DynamoMpiError):
    """The model cannot run in this layout."""

    exit_code = ExitCode.ILLEGAL_LAYOUT


class PhaseTimeoutError(DynamoMpiError):
    """A phase exceeded its time limit."""

    exit_code = ExitCode.DEADLINE
