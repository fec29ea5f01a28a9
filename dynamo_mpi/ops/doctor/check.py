# SPDX-License-Identifier: Apache-2.0
"""One thing that was looked at, and how it is."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.layout.finding import Severity

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.layout.finding import Finding


class Status(Enum):
    """How it is. Only an error stops a worker."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    SKIPPED = "skipped"


class Check(NamedTuple):
    """One thing that was looked at.

    Args:
        id: its name, stable within its section, for scripts.
        status: how it is.
        found: what was found; of one that was skipped, why.
        needed: what has to be instead; empty where it is ok.
        fix: what to do.
        code: of an error, what the command exits with.
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
    """Return a check of something that is as it should be."""
    return Check(id, Status.OK, found)


def skipped(id: str, why: str, fix: str = "") -> Check:
    """Return a check that can't be made here."""
    return Check(id, Status.SKIPPED, why, fix=fix)


def warning(id: str, found: str, needed: str, fix: str = "") -> Check:
    """Return a check of something that a user should look at."""
    return Check(id, Status.WARNING, found, needed, fix)


def error(id: str, found: str, needed: str, fix: str = "", code: ExitCode = ExitCode.USAGE) -> Check:
    """Return a check of something that stops a worker."""
    return Check(id, Status.ERROR, found, needed, fix, code)


def trouble(id: str, found: str, needed: str, fix: str = "", *, fatal: bool, code: ExitCode = ExitCode.USAGE) -> Check:
    """Return an error where the thing is needed in this very place, or else a warning."""
    return error(id, found, needed, fix, code) if fatal else warning(id, found, needed, fix)


def of_error(id: str, problem: DynamoMpiError, *, fatal: bool = True) -> Check:
    """Return the check of something that a worker would have ended with."""
    return trouble(id, problem.found, problem.needed, problem.fix, fatal=fatal, code=problem.exit_code)


def of_finding(id: str, finding: Finding) -> Check:
    """Return what a rule of the preflight found; its errors are those of a launch."""
    text = f"{finding.message}: {finding.found}" if finding.found else finding.message
    if finding.severity is Severity.INFO:
        return ok(id, text)
    return trouble(id, text, finding.needed, finding.fix, fatal=finding.severity is Severity.ERROR)
