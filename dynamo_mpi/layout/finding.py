# SPDX-License-Identifier: Apache-2.0
"""A finding: the result of a rule that is not met."""

from __future__ import annotations

from enum import Enum

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Severity(Enum):
    """Severity of a finding. Only an error stops a world."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Args:
        rule: id of the rule, e.g. ``"B1"``: stable, for scripts and for looking it up.
        severity: its severity.
        message: the problem, in one sentence.
        found: the values that were found.
        expected: what is expected.
        fix: the fix.
    """

    rule: str
    severity: Severity
    message: str
    found: str = ""
    expected: str = ""
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the finding as plain data."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "message": self.message,
            "found": self.found,
            "needed": self.expected,
            "fix": self.fix,
        }


def error(rule: str, message: str, *, found: str = "", expected: str = "", fix: str = "") -> Finding:
    """Return a finding that stops a world."""
    return Finding(rule, Severity.ERROR, message, found, expected, fix)


def warning(rule: str, message: str, *, found: str = "", expected: str = "", fix: str = "") -> Finding:
    """Return a finding that a user should check."""
    return Finding(rule, Severity.WARNING, message, found, expected, fix)


def info(rule: str, message: str, *, found: str = "", expected: str = "", fix: str = "") -> Finding:
    """Return a finding that is only information."""
    return Finding(rule, Severity.INFO, message, found, expected, fix)


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that stop a world."""
    return [finding for finding in findings if finding.severity is Severity.ERROR]


def render(findings: Sequence[Finding]) -> str:
    """Format findings as text, errors first; information takes one line."""
    lines: list[str] = []
    order = [Severity.ERROR, Severity.WARNING, Severity.INFO]
    for finding in sorted(findings, key=lambda f: order.index(f.severity)):
        lines.append(f"{finding.severity.value} {finding.rule}: {finding.message}")
        if finding.severity is Severity.INFO:
            lines[-1] += f" ({finding.fix})" if finding.fix else ""
            continue
        for name, value in (("found", finding.found), ("expected", finding.expected), ("fix", finding.fix)):
            if value:
                first, *rest = value.split("\n")
                lines.append(f"  {name + ':':<10}{first}")
                lines += [" " * 12 + line for line in rest]
    return "\n".join(lines)
