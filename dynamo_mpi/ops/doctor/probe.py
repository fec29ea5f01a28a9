# SPDX-License-Identifier: Apache-2.0
"""The results of the hardware checks on this machine, as a section of doctor's report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.ops.doctor.check import of_finding, ok, skipped
from dynamo_mpi.ops.doctor.context import Probe, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.checks.local_check import LocalResult
    from dynamo_mpi.ops.doctor.check import Check

NAME = "probe"


def section_of(here: LocalResult) -> Section:
    """Return the section. The hardware checks have run before, in the main thread, because their processes end with the thread."""
    return Section(NAME, (Probe(NAME, lambda _: checks_of(here)),))


def checks_of(here: LocalResult) -> Iterator[Check]:
    """Convert the results to checks. Pure."""
    for line in here.lines:
        # "gpu", and "fabric over" the name and version of a library
        name = line.partition(":")[0].partition(" ")[0]
        yield (
            ok(name, line.removeprefix(f"{name}: ")) if here.figures else skipped(name, line.removeprefix(f"{name}: "))
        )
    for finding in here.findings:
        yield of_finding(finding.rule, finding)
