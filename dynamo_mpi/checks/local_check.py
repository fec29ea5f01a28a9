# SPDX-License-Identifier: Apache-2.0
"""The hardware checks on one machine, without ranks and MPI: its GPUs, and the links between them. For `dynamo-mpi doctor --probe`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric import judge_fabric
from dynamo_mpi.checks.fabric_steps import FAILED, SKIPPED, FabricAnswer
from dynamo_mpi.checks.gpu_check import HealthRow, check_health, figures_of
from dynamo_mpi.checks.gpu_facts import visible_gpus
from dynamo_mpi.checks.gpu_health import health_of_node
from dynamo_mpi.checks.gpu_rules import kind_of
from dynamo_mpi.checks.hardware import NODE, CheckResult, EvaluationInput, HardwareCheckPlan
from dynamo_mpi.checks.nccl_fabric import CheckProcess, EndedError, LateError, read_results
from dynamo_mpi.common.process import host_name
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from dynamo_mpi.checks.gpu_health import GpuHealth
    from dynamo_mpi.layout.finding import Finding


class LocalResult(NamedTuple):
    """The result for this machine.

    Args:
        figures: by check, as plain data; empty if there is no GPU.
        findings: the problems. A GPU is named by its number among the checked ones.
        lines: one line per check.
    """

    figures: dict[str, Any]
    findings: tuple[Finding, ...]
    lines: tuple[str, ...]


class _Host(NamedTuple):
    host: str


def check_this_host(environ: Mapping[str, str] | None = None, seconds: float = 30.0) -> LocalResult:
    """Check all GPUs of this machine, and NCCL between those that this process may use. Call it from the main thread.

    Args:
        environ: for the processes that use the GPUs; this process's own by default.
        seconds: for NCCL.
    """
    gpus = health_of_node()
    if not gpus:
        return LocalResult({}, (), ("gpu: no GPU here",))
    environ = os.environ if environ is None else environ
    host = host_name()
    usable = len(visible_gpus([one.facts for one in gpus if not one.problem], environ))
    findings = check_health([HealthRow(host, health) for health in gpus])
    figures: dict[str, Any] = {"gpu": figures_of(gpus)}
    lines = [f"gpu: {sum(not health.problem for health in gpus)} of {counted(len(gpus), 'GPU')} read"]
    if usable > 1:
        fabric = _fabric(gpus, usable, environ, host, seconds, figures)
        figures["fabric"] = dict(fabric.figures)
        findings += fabric.findings
        lines.append(fabric.line)
    return LocalResult(figures, tuple(map(_of_gpus, findings)), tuple(lines))


def _fabric(
    gpus: Sequence[GpuHealth],
    usable: int,
    environ: Mapping[str, str],
    host: str,
    seconds: float,
    earlier: Mapping[str, Any],
) -> CheckResult:
    ranks = tuple(range(usable))
    plan = HardwareCheckPlan(("fabric",), seconds, "nccl", ((NODE, (ranks,)), ("tp", (ranks,))))
    kinds = {kind_of(one.facts.name, one.facts.sm, one.facts.total_bytes) for one in gpus}
    case = EvaluationInput(plan, [_Host(host)] * usable, kinds.pop() if len(kinds) == 1 else None, earlier=earlier)
    return judge_fabric(_measure(plan, usable, environ), case)


def _measure(plan: HardwareCheckPlan, size: int, environ: Mapping[str, str]) -> list[FabricAnswer]:
    began = time.monotonic()
    end = began + plan.seconds
    children = [CheckProcess(rank, size, plan, environ) for rank in range(size)]
    try:
        problems = [""] * size
        libraries = [""] * size
        for rank, child in enumerate(children):
            try:
                libraries[rank] = str(json.loads(child.read_line(end)[1])["library"])
            except (EndedError, LateError) as error:
                problems[rank] = str(error) or f"it did not start in {plan.seconds:g} s"
        if any(problems):
            return [FabricAnswer(FAILED if problem else SKIPPED, problem) for problem in problems]
        try:
            children[0].send_line("identify")
            joined = children[0].read_line(end)[1]
        except (EndedError, LateError) as error:
            return [FabricAnswer(FAILED, str(error)), *[FabricAnswer(SKIPPED)] * (size - 1)]
        for child in children:
            child.send_line(f"join {joined}")
        # their output stays in the pipes until it is read
        return [read_results(child, library, began, end) for child, library in zip(children, libraries, strict=True)]
    finally:
        for child in children:
            child.close()


def _of_gpus(finding: Finding) -> Finding:
    """Name GPUs where the rules name ranks."""

    def with_gpus(text: str) -> str:
        return text.replace("ranks ", "GPUs ").replace("rank ", "GPU ")

    return replace(finding, message=with_gpus(finding.message), found=with_gpus(finding.found))
