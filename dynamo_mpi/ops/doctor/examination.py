# SPDX-License-Identifier: Apache-2.0
"""Runs all checks of doctor at the same time, with a time limit: a check that hangs or fails is reported like any other."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.ops.doctor.check import Check, error, of_error, warning
from dynamo_mpi.ops.doctor.commands import end_all
from dynamo_mpi.ops.doctor.report import Report, SectionReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.ops.doctor.context import Context, Probe, Section


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
