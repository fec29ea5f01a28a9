# SPDX-License-Identifier: Apache-2.0
"""Ask all questions at once, and be done in time: one that doesn't answer, or fails, is a finding like any other."""

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

    from dynamo_mpi.ops.doctor.context import Context, Question, Section


def examine(sections: Sequence[Section], context: Context, host: str) -> Report:
    """Ask everything, each question in a thread of its own; a thread that hangs, on a lost file system say, is left behind.

    Args:
        sections: what to look at.
        context: how, and until when.
        host: this machine's name, for the report.
    """
    answers = [[_Asked(question, context) for question in section.questions] for section in sections]
    try:
        everything = [asked for group in answers for asked in group]
        for asked in everything:
            asked.thread.start()
        for asked in everything:
            asked.thread.join(max(0.0, context.started + context.seconds - time.monotonic()))
    finally:
        end_all()
    return Report(
        host,
        tuple(
            SectionReport(section.name, tuple(check for asked in group for check in asked.checks()))
            for section, group in zip(sections, answers, strict=True)
        ),
        time.monotonic() - context.started,
    )


class _Asked:
    def __init__(self, question: Question, context: Context) -> None:
        self._question, self._context = question, context
        self._answers: list[Check] = []
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=f"doctor {question.id}", daemon=True)

    def _run(self) -> None:
        try:
            for check in self._question.ask(self._context):
                self._answers.append(check)
        except DynamoMpiError as problem:
            self._answers.append(of_error(self._question.id, problem))
        except Exception as problem:
            self._answers.append(failure_of(self._question.id, problem))
        self._ended = True

    def checks(self) -> tuple[Check, ...]:
        """Return what has been found up to now; what was found before the rest failed or hung counts."""
        ended, found = self._ended, list(self._answers)
        if not ended:
            found.append(no_answer(self._question.id, self._context.seconds))
        if found and any(check.id == found[-1].id for check in found[:-1]):
            found[-1] = found[-1]._replace(id=f"{found[-1].id}-rest")
        return tuple(found)


def failure_of(id: str, problem: Exception) -> Check:
    """Return the check of a question that failed: a mistake of ours, which says nothing of the machine."""
    return error(
        id,
        f"this check itself failed: {type(problem).__name__}: {' '.join(str(problem).split())}",
        "a check that copes with what it finds",
        "report it with this line; --only leaves its section out",
        ExitCode.ENGINE,
    )


def no_answer(id: str, seconds: float) -> Check:
    """Return the check of a question that took too long."""
    return warning(
        id,
        f"no answer within {seconds:g} s",
        "an answer: what hangs here hangs in a worker too",
        "look at file systems, name look-ups and drivers on this machine, or give it more time: --timeout",
    )
