# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Each says what was found, what is needed, and what to do.

``rank`` and ``host`` are not part of the text: whoever prints the error adds them once.
"""

from __future__ import annotations

from dynamo_mpi.common.exit_codes import ExitCode


class BootstrapError(Exception):
    """Base of every error that ends a world in an orderly way.

    Args:
        found: what was found, as one sentence without a full stop.
        needed: what has to be true instead.
        fix: what to do about it; a command where one exists.
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
            lines.append(f"  needed: {self.needed}")
        if self.fix:
            lines.append(f"  do:     {self.fix}")
        return "\n".join(lines)

    def plain(self) -> dict[str, int | str]:
        """Return it as plain data, for programs."""
        return {"exit_code": int(self.exit_code), "found": self.found, "needed": self.needed, "fix": self.fix}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.needed, self.fix)


def _rebuild(kind: type[BootstrapError], found: str, needed: str, fix: str) -> BootstrapError:
    return kind(found, needed=needed, fix=fix)


class UsageError(BootstrapError):
    """Wrong flags or settings."""

    exit_code = ExitCode.USAGE


class MislaunchError(BootstrapError):
    """The launcher started something else than the world that was asked for."""

    exit_code = ExitCode.USAGE


class DataError(BootstrapError):
    """A file's contents are not what they should be."""

    exit_code = ExitCode.DATA


class ModelError(BootstrapError):
    """The model folder or one of its files cannot be read."""

    exit_code = ExitCode.NO_MODEL


class DiscoveryError(BootstrapError):
    """etcd or NATS does not answer."""

    exit_code = ExitCode.UNAVAILABLE


class AuthorisationError(BootstrapError):
    """etcd or NATS refused the credentials."""

    exit_code = ExitCode.NOT_AUTHORISED


class EngineError(BootstrapError):
    """The engine failed."""

    exit_code = ExitCode.ENGINE


class TemporaryError(BootstrapError):
    """Something outside went away; a fresh start is the cure."""

    exit_code = ExitCode.TEMPORARY


class LayoutError(BootstrapError):
    """The model cannot run in this layout."""

    exit_code = ExitCode.ILLEGAL_LAYOUT


class DeadlineError(BootstrapError):
    """A phase did not end in its time."""

    exit_code = ExitCode.DEADLINE
