# SPDX-License-Identifier: Apache-2.0
"""What the probes have found on this machine, as a section of doctor's report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.ops.doctor.check import of_finding, ok, skipped
from dynamo_mpi.ops.doctor.context import Question, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.checks.local_check import LocalResult
    from dynamo_mpi.ops.doctor.check import Check

NAME = "probe"


def section_of(here: LocalResult) -> Section:
    """Return the section; the probes have run by then, in the main thread, with which their processes live and die."""
    return Section(NAME, (Question(NAME, lambda _: checks_of(here)),))


def checks_of(here: LocalResult) -> Iterator[Check]:
    """Judge what they have found. Pure."""
    for line in here.lines:
        # gpu, and fabric over a library's name and version
        name = line.partition(":")[0].partition(" ")[0]
        yield (
            ok(name, line.removeprefix(f"{name}: ")) if here.figures else skipped(name, line.removeprefix(f"{name}: "))
        )
    for finding in here.findings:
        yield of_finding(finding.rule, finding)
