# SPDX-License-Identifier: Apache-2.0
"""The result of one check of doctor."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.layout.finding import Severity

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.layout.finding import Finding


class Status(Enum):
    """Result of a check. Only an error stops a worker."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    SKIPPED = "skipped"


class Check(NamedTuple):
    """One check.

    Args:
        id: its name for scripts, stable within its section.
        status: the result.
        found: what was found; for a skipped check, the reason.
        needed: what is expected; empty if it is ok.
        fix: the fix.
        code: for an error, the exit code of the command.
    """

    id: str
    status: Status
    found: str
    needed: str = ""
    fix: str = ""
    code: ExitCode = ExitCode.OK

    def as_json(self) -> dict[str, str]:
        """Return it as plain data."""
        return {
            "id": self.id,
            "status": self.status.value,
            "found": self.found,
            "needed": self.needed,
            "fix": self.fix,
        }


def ok(id: str, found: str) -> Check:
    """Return a check without a problem."""
    return Check(id, Status.OK, found)


def skipped(id: str, why: str, fix: str = "") -> Check:
    """Return a check that can't run here."""
    return Check(id, Status.SKIPPED, why, fix=fix)


def warning(id: str, found: str, needed: str, fix: str = "") -> Check:
    """Return a check with a problem that does not stop a worker."""
    return Check(id, Status.WARNING, found, needed, fix)


def error(id: str, found: str, needed: str, fix: str = "", code: ExitCode = ExitCode.USAGE) -> Check:
    """Return a check with a problem that stops a worker."""
    return Check(id, Status.ERROR, found, needed, fix, code)


def error_or_warning(
    id: str, found: str, needed: str, fix: str = "", *, fatal: bool, code: ExitCode = ExitCode.USAGE
) -> Check:
    """Return an error if ``fatal``, otherwise a warning."""
    return error(id, found, needed, fix, code) if fatal else warning(id, found, needed, fix)


def of_error(id: str, problem: DynamoMpiError, *, fatal: bool = True) -> Check:
    """Return the check for an error with which a worker would end."""
    return error_or_warning(id, problem.found, problem.needed, problem.fix, fatal=fatal, code=problem.exit_code)


def of_finding(id: str, finding: Finding) -> Check:
    """Return the check for a finding of a preflight rule."""
    text = f"{finding.message}: {finding.found}" if finding.found else finding.message
    if finding.severity is Severity.INFO:
        return ok(id, text)
    return error_or_warning(id, text, finding.needed, finding.fix, fatal=finding.severity is Severity.ERROR)
