# SPDX-License-Identifier: Apache-2.0
"""The phase between the verdict and the load: each probe on every rank, one gather, and rank 0's word. Three collectives, five with NCCL."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.fabric_steps import steps_of
from dynamo_mpi.checks.hang_diagnosis import HangError, find_blocking_ranks, read_note
from dynamo_mpi.checks.hardware import CheckContext
from dynamo_mpi.checks.hardware_check_plan import START_SHARE, WAIT_SHARE
from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.errors import RetryableError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.layout.finding import Severity, errors, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dynamo_mpi.checks.hardware import CheckResult, EvaluationInput
    from dynamo_mpi.checks.hardware_check_plan import HardwareCheckPlan
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor

_MODULES = {"gpu": "dynamo_mpi.checks.gpu_check", "fabric": "dynamo_mpi.checks.fabric"}
# a probe that ends by itself at its deadline gets this long to say so
_GRACE_SECONDS = 3.0
# after which even a rank 0 that is stuck in native code ends the world
_LAST_SECONDS = 10.0


class Report(NamedTuple):
    """What the probes have found.

    Args:
        findings: of all probes.
        figures: by probe; and ``seconds``, of the whole phase.
        lines: the figures in a few words.
        code: what an error ends the world with, unless the probe hangs.
    """

    findings: tuple[Finding, ...]
    figures: dict[str, Any]
    lines: tuple[str, ...]
    code: ExitCode = ExitCode.TEMPORARY

    @property
    def error(self) -> DynamoMpiError | None:
        """What the world has to end with; None to go on."""
        found = errors(self.findings)
        if not found:
            return None
        stuck = next((finding for finding in found if finding.rule == "N2"), None)
        if stuck is not None:
            return HangError.of(stuck)
        count = "1 error" if len(found) == 1 else f"{len(found)} errors"
        return ProbeError(f"{count}, nothing was loaded\n{render(found)}", self.code)

    @property
    def text(self) -> str:
        """What to tell of a world that goes on: one line when all is well."""
        told = render([finding for finding in self.findings if finding.severity is Severity.WARNING])
        line = f"probe: {self.figures['seconds']:.1f} s; {'; '.join(self.lines)}"
        return f"{line}\n{told}" if told else line


class ProbeError(RetryableError):
    """The hardware is not as it has to be; on other nodes the same command may well run.

    Args:
        found: the findings, as text.
        code: what all ranks leave with.
    """

    def __init__(self, found: str, code: ExitCode) -> None:
        super().__init__(found)
        self.exit_code = code


def run_local(world: World, plan: HardwareCheckPlan, environ: Mapping[str, str]) -> list[bytes]:
    """Run this rank's part of all probes. Collective; rank 0 gets all answers, the others nothing."""
    part = CheckContext(world, plan, environ, time.monotonic())
    values: list[str] = []
    for name in plan.names:
        answer = import_module(_MODULES[name]).measure(part)
        values += [str(len(answer)), *answer]
    return world.gather(encode_strings(values))


def run_hardware_checks(
    world: World, case: EvaluationInput, guard: WorldSupervisor, environ: Mapping[str, str], *, strict: bool
) -> Report:
    """Run them as rank 0, and judge.

    Args:
        world: all ranks.
        case: what to judge by, with the plan.
        guard: ends a world that hangs in a probe.
        environ: rank 0's environment.
        strict: warnings are errors.
    """
    began = time.monotonic()
    plan = case.plan
    seconds = allowed_seconds(plan)
    late = guard.deadline(seconds + _LAST_SECONDS, "the probe has not come to its end", "--probe-seconds")
    with late, _watched(guard, case, seconds):
        answers = run_local(world, plan, environ)
    outcomes: dict[str, CheckResult] = {}
    for name, told in _by_probe(plan, answers).items():
        earlier = {before: outcome.figures for before, outcome in outcomes.items()}
        outcomes[name] = _judge(name, told, case._replace(earlier=earlier))
    findings = [finding for outcome in outcomes.values() for finding in outcome.findings]
    # the preflight's own code for what it would have refused; else another allocation is the cure
    refused = any(finding.rule == "V2" for finding in errors(findings))
    if strict:
        findings = [finding if finding.severity is not Severity.WARNING else _as_error(finding) for finding in findings]
    figures: dict[str, Any] = {name: dict(outcome.figures) for name, outcome in outcomes.items()}
    figures["seconds"] = round(time.monotonic() - began, 3)
    lines = tuple(outcome.line for outcome in outcomes.values() if outcome.line)
    return Report(tuple(findings), figures, lines, ExitCode.USAGE if refused else ExitCode.TEMPORARY)


def allowed_seconds(plan: HardwareCheckPlan) -> float:
    """Return how long all probes may take: as much as each of them allows itself, so that none that ends in its time ends the world."""
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


def _by_probe(plan: HardwareCheckPlan, answers: Sequence[bytes]) -> dict[str, list[list[str]]]:
    told: dict[str, list[list[str]]] = {name: [] for name in plan.names}
    for answer in answers:
        values = decode_strings(answer)
        for name in plan.names:
            end = 1 + int(values[0])
            told[name].append(values[1:end])
            values = values[end:]
    return told


@contextmanager
def _watched(guard: WorldSupervisor, case: EvaluationInput, seconds: float) -> Iterator[None]:
    """End the world when the probe hangs, with a word of who keeps whom waiting."""

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
        timer.join()  # one that has begun ends the world
