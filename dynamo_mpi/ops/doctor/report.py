# SPDX-License-Identifier: Apache-2.0
"""Doctor's report as text and as JSON. All of it is redacted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.redact import own_redactor
from dynamo_mpi.layout.format import counted
from dynamo_mpi.ops.doctor.check import Check, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = 1
_WIDTH = max(len(status.value) for status in Status)


class SectionReport(NamedTuple):
    """One section's checks."""

    name: str
    checks: tuple[Check, ...]


class Report(NamedTuple):
    """All checks.

    Args:
        host: the host's name.
        sections: in their order.
        seconds: the duration.
    """

    host: str
    sections: tuple[SectionReport, ...]
    seconds: float

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, in order."""
        return tuple(check for section in self.sections for check in section.checks)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the first error, or 0."""
        return next((check.code for check in self.checks if check.status is Status.ERROR), ExitCode.OK)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data. Keys are added, never removed."""
        return {
            "schema": SCHEMA,
            "ok": self.exit_code is ExitCode.OK,
            "host": self.host,
            "exit_code": int(self.exit_code),
            "seconds": round(self.seconds, 3),
            "sections": [
                {"name": section.name, "checks": [_redacted(check).as_json() for check in section.checks]}
                for section in self.sections
            ],
        }

    def as_text(self) -> str:
        """Return it as text: a line for each check, followed by the expectation and the fix if it isn't ok."""
        lines = [line for section in self.sections for line in _section_lines(section)]
        return "\n".join([*lines, self._counts()])

    def _counts(self) -> str:
        number = {status: sum(check.status is status for check in self.checks) for status in Status}
        return (
            f"{self.host}: {number[Status.OK]} ok, {counted(number[Status.WARNING], 'warning')}, "
            f"{counted(number[Status.ERROR], 'error')}, {number[Status.SKIPPED]} skipped, in {self.seconds:.1f} s"
        )


def _section_lines(section: SectionReport) -> Iterator[str]:
    yield f"{section.name}:"
    for check in map(_redacted, section.checks):
        first, *rest = check.found.split("\n")
        yield f"{check.status.value:<{_WIDTH}} {check.id}: {first}"
        yield from (" " * 10 + line for line in rest)
        for name, value in (("expected", check.needed), ("fix", check.fix)):
            if value and check.status is not Status.OK:
                start, *more = value.split("\n")
                yield f"  {name + ':':<10}{start}"
                yield from (" " * 12 + line for line in more)
    yield ""


def _redacted(check: Check) -> Check:
    redact = own_redactor().redact
    return check._replace(found=redact(check.found), needed=redact(check.needed), fix=redact(check.fix))
