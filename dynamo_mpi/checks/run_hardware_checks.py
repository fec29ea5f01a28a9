# SPDX-License-Identifier: Apache-2.0
"""The phase between preflight and load: each hardware check on every rank, one gather, and rank 0's decision. Three collectives, five with
NCCL."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.fabric_steps import steps_of
from dynamo_mpi.checks.hang_diagnosis import HangError, find_blocking_ranks, read_note
from dynamo_mpi.checks.hardware import START_SHARE, WAIT_SHARE, CheckContext
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.errors import ExitCode, RetryableError
from dynamo_mpi.layout.finding import Severity, errors, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dynamo_mpi.checks.hardware import CheckResult, EvaluationInput, HardwareCheckPlan
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor

_MODULES = {"gpu": "dynamo_mpi.checks.gpu_check", "fabric": "dynamo_mpi.checks.fabric"}
# additional time for a check that ends by itself at its deadline to report that
_GRACE_SECONDS = 3.0
# after this, the world ends even if rank 0 hangs in native code
_LAST_SECONDS = 10.0


class Report(NamedTuple):
    """The results of all checks.

    Args:
        findings: of all checks.
        figures: by check; and ``seconds``, of the whole phase.
        lines: one line per check.
        code: the exit code for an error, unless a check hangs.
    """

    findings: tuple[Finding, ...]
    figures: dict[str, Any]
    lines: tuple[str, ...]
    code: ExitCode = ExitCode.TEMPORARY

    @property
    def error(self) -> DynamoMpiError | None:
        """The error with which the world must end; None to go on."""
        found = errors(self.findings)
        if not found:
            return None
        stuck = next((finding for finding in found if finding.rule == "N2"), None)
        if stuck is not None:
            return HangError.of(stuck)
        count = "1 error" if len(found) == 1 else f"{len(found)} errors"
        return HardwareCheckError(f"{count}, nothing was loaded\n{render(found)}", self.code)

    @property
    def text(self) -> str:
        """The report if the world goes on: one line, and the warnings."""
        warnings = render([finding for finding in self.findings if finding.severity is Severity.WARNING])
        line = f"probe: {self.figures['seconds']:.1f} s; {'; '.join(self.lines)}"
        return f"{line}\n{warnings}" if warnings else line


class HardwareCheckError(RetryableError):
    """The hardware does not meet the requirements; on other nodes the same command may run.

    Args:
        found: the findings, as text.
        code: the exit code of all ranks.
    """

    def __init__(self, found: str, code: ExitCode) -> None:
        super().__init__(found)
        self.exit_code = code


def run_local(world: World, plan: HardwareCheckPlan, environ: Mapping[str, str]) -> list[bytes]:
    """Run this rank's part of all checks. Collective; rank 0 gets all answers, other ranks an empty list."""
    part = CheckContext(world, plan, environ, time.monotonic())
    values: list[str] = []
    for name in plan.names:
        answer = import_module(_MODULES[name]).measure(part)
        values += [str(len(answer)), *answer]
    return world.gather(encode_strings(values))


def run_hardware_checks(
    world: World, case: EvaluationInput, guard: WorldSupervisor, environ: Mapping[str, str], *, strict: bool
) -> Report:
    """Run the checks as rank 0, and evaluate them.

    Args:
        world: all ranks.
        case: the input of the evaluation, with the plan.
        guard: ends a world that hangs in a check.
        environ: rank 0's environment.
        strict: warnings are errors.
    """
    began = time.monotonic()
    plan = case.plan
    seconds = allowed_seconds(plan)
    late = guard.deadline(seconds + _LAST_SECONDS, "the hardware check has not ended", "--probe-seconds")
    with late, _hang_watchdog(guard, case, seconds):
        answers = run_local(world, plan, environ)
    outcomes: dict[str, CheckResult] = {}
    for name, rank_answers in _by_check(plan, answers).items():
        earlier = {before: outcome.figures for before, outcome in outcomes.items()}
        outcomes[name] = _judge(name, rank_answers, case._replace(earlier=earlier))
    findings = [finding for outcome in outcomes.values() for finding in outcome.findings]
    # V2 is a rule of the preflight and has its exit code; for others, another allocation may help
    refused = any(finding.rule == "V2" for finding in errors(findings))
    if strict:
        findings = [finding if finding.severity is not Severity.WARNING else _as_error(finding) for finding in findings]
    figures: dict[str, Any] = {name: dict(outcome.figures) for name, outcome in outcomes.items()}
    figures["seconds"] = round(time.monotonic() - began, 3)
    lines = tuple(outcome.line for outcome in outcomes.values() if outcome.line)
    return Report(tuple(findings), figures, lines, ExitCode.USAGE if refused else ExitCode.TEMPORARY)


def allowed_seconds(plan: HardwareCheckPlan) -> float:
    """Return the time limit of all checks: the sum of their own limits, so that a check that ends in time never ends the world."""
    seconds = plan.seconds
    seconds += plan.seconds * WAIT_SHARE if "gpu" in plan.names else 0.0
    if "fabric" in plan.names and plan.over == "nccl":
        seconds += plan.seconds * START_SHARE + _GRACE_SECONDS
    return seconds


def _judge(name: str, answers: Sequence[Sequence[str]], case: EvaluationInput) -> CheckResult:
    outcome: CheckResult = import_module(_MODULES[name]).judge(answers, case)
    return outcome


def _as_error(finding: Finding) -> Finding:
    from dataclasses import replace

    return replace(finding, severity=Severity.ERROR)


def _by_check(plan: HardwareCheckPlan, answers: Sequence[bytes]) -> dict[str, list[list[str]]]:
    by_check: dict[str, list[list[str]]] = {name: [] for name in plan.names}
    for answer in answers:
        values = decode_strings(answer)
        for name in plan.names:
            end = 1 + int(values[0])
            by_check[name].append(values[1:end])
            values = values[end:]
    return by_check


@contextmanager
def _hang_watchdog(guard: WorldSupervisor, case: EvaluationInput, seconds: float) -> Iterator[None]:
    """End the world if a check hangs, with a report of the blocking ranks."""

    def end() -> None:
        stacks = guard.stacks()
        silent = [rank for rank in range(len(case.ranks)) if rank not in stacks]
        notes = {rank: read_note(text) for rank, text in stacks.items()}
        hosts = [place.host for place in case.ranks]
        guard.abort(
            HangError.of(find_blocking_ranks(notes, silent, steps_of(case.plan), hosts, case.plan.seconds, guard.name))
        )

    timer = threading.Timer(seconds, end)
    timer.daemon, timer.name = True, "watch"
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # if it has started, it ends the world
