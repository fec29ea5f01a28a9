# SPDX-License-Identifier: Apache-2.0
"""Selects doctor's sections, runs all of their probes at the same time, and reports the results as text and as JSON.

A probe that hangs or fails is reported like any other. All of the report is redacted.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, UsageError
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.layout.format import counted
from dynamo_mpi.ops.doctor import environment, fabric, gpus, host, mpi, packages, ports, services, slurm
from dynamo_mpi.ops.doctor.check import (
    Check,
    Context,
    Probe,
    Section,
    Status,
    error,
    of_error,
    of_finding,
    ok,
    skipped,
    warning,
)
from dynamo_mpi.ops.doctor.commands import end_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.local_check import LocalResult

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
        for name, value in (("expected", check.expected), ("fix", check.fix)):
            if value and check.status is not Status.OK:
                start, *more = value.split("\n")
                yield f"  {name + ':':<10}{start}"
                yield from (" " * 12 + line for line in more)
    yield ""


def _redacted(check: Check) -> Check:
    redact = process_redactor().redact
    return check._replace(found=redact(check.found), expected=redact(check.expected), fix=redact(check.fix))


def run_sections(sections: Sequence[Section], context: Context, host: str) -> Report:
    """Run all probes, each in a thread; a thread that hangs, for example on a lost file system, is abandoned.

    Args:
        sections: the sections to run.
        context: environment and time limit.
        host: this machine's name, for the report.
    """
    answers = [[_RunningProbe(probe, context) for probe in section.probes] for section in sections]
    try:
        all_running = [running for group in answers for running in group]
        for running in all_running:
            running.thread.start()
        for running in all_running:
            running.thread.join(max(0.0, context.started + context.seconds - time.monotonic()))
    finally:
        end_all()
    return Report(
        host,
        tuple(
            SectionReport(section.name, tuple(check for running in group for check in running.checks()))
            for section, group in zip(sections, answers, strict=True)
        ),
        time.monotonic() - context.started,
    )


class _RunningProbe:
    def __init__(self, probe: Probe, context: Context) -> None:
        self._probe, self._context = probe, context
        self._answers: list[Check] = []
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=f"doctor {probe.id}", daemon=True)

    def _run(self) -> None:
        try:
            for check in self._probe.ask(self._context):
                self._answers.append(check)
        except DynamoMpiError as problem:
            self._answers.append(of_error(self._probe.id, problem))
        except Exception as problem:
            self._answers.append(failure_of(self._probe.id, problem))
        self._ended = True

    def checks(self) -> tuple[Check, ...]:
        """Return the checks so far, including those before a failure or a hang."""
        ended, found = self._ended, list(self._answers)
        if not ended:
            found.append(no_answer(self._probe.id, self._context.seconds))
        if found and any(check.id == found[-1].id for check in found[:-1]):
            found[-1] = found[-1]._replace(id=f"{found[-1].id}-rest")
        return tuple(found)


def failure_of(id: str, problem: Exception) -> Check:
    """Return the check for a probe that raised an exception: a bug in dynamo_mpi, not a problem of the machine."""
    return error(
        id,
        f"this check itself failed: {type(problem).__name__}: {' '.join(str(problem).split())}",
        "a check that copes with what it finds",
        "report it with this line; --only can exclude its section",
        ExitCode.ENGINE,
    )


def no_answer(id: str, seconds: float) -> Check:
    """Return the check for a probe that took too long."""
    return warning(
        id,
        f"no answer within {seconds:g} s",
        "an answer: what hangs here hangs in a worker too",
        "look at file systems, name look-ups and drivers on this machine, or give it more time: --timeout",
    )


SECTIONS: tuple[Section, ...] = (
    packages.SECTION,
    mpi.SECTION,
    slurm.SECTION,
    gpus.SECTION,
    fabric.SECTION,
    services.SECTION,
    ports.SECTION,
    ports.LISTENERS,
    host.SECTION,
    environment.SECTION,
)


def chosen(only: str | None, further: Sequence[Section] = ()) -> tuple[Section, ...]:
    """Return the sections to run.

    Args:
        only: names with commas between; None for all.
        further: additional sections, at the end.

    Raises:
        UsageError: a section doesn't exist.
    """
    everything = (*SECTIONS, *further)
    if only is None:
        return everything
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [section.name for section in everything]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"--only: there is no section {', '.join(unknown)}",
            expected=f"some of {', '.join(known)}",
            fix="correct --only",
        )
    if not names:
        raise UsageError(
            "--only names no section", expected=f"some of {', '.join(known)}", fix="name one, or omit --only"
        )
    return tuple(section for section in everything if section.name in names)


HARDWARE_SECTION = "probe"


def section_of(here: LocalResult) -> Section:
    """Return the section. The hardware checks have run before, in the main thread, because their processes end with the thread."""
    return Section(HARDWARE_SECTION, (Probe(HARDWARE_SECTION, lambda _: checks_of(here)),))


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
