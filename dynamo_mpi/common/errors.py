# SPDX-License-Identifier: Apache-2.0
"""The errors that a user may get. Each states the problem, what is expected, and the fix.

``rank`` and ``host`` are not part of the text: the logger adds them once.
"""

from __future__ import annotations

from dynamo_mpi.common.exit_codes import ExitCode


class DynamoMpiError(Exception):
    """Base class of all errors that a user may get.

    Args:
        found: the problem, as one sentence without a full stop.
        needed: what is expected instead.
        fix: what the user can do, with a command if there is one.
    """

    exit_code: ExitCode = ExitCode.ENGINE

    def __init__(self, found: str, *, needed: str = "", fix: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.needed = needed
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.found]
        if self.needed:
            lines.append(f"  expected: {self.needed}")
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)

    def plain(self) -> dict[str, int | str]:
        """Return the error as JSON values, for programs."""
        return {"exit_code": int(self.exit_code), "found": self.found, "needed": self.needed, "fix": self.fix}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.needed, self.fix)


def _rebuild(kind: type[DynamoMpiError], found: str, needed: str, fix: str) -> DynamoMpiError:
    return kind(found, needed=needed, fix=fix)


class UsageError(DynamoMpiError):
    """Wrong flags or settings."""

    exit_code = ExitCode.USAGE


class LaunchError(DynamoMpiError):
    """The launcher started something other than the requested world."""

    exit_code = ExitCode.USAGE


class ConfigFileError(DynamoMpiError):
    """A file's content is invalid."""

    exit_code = ExitCode.DATA


class ModelNotFoundError(DynamoMpiError):
    """The model directory or one of its files cannot be read."""

    exit_code = ExitCode.NO_MODEL


class DiscoveryError(DynamoMpiError):
    """etcd or NATS does not answer."""

    exit_code = ExitCode.UNAVAILABLE


class AuthorizationError(DynamoMpiError):
    """etcd or NATS refused the credentials."""

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
