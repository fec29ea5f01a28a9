# SPDX-License-Identifier: Apache-2.0
"""The probes on one machine, without ranks and without MPI: its GPUs, and the way between them. For `dynamo-mpi doctor --probe`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.fabric import judge_fabric
from dynamo_mpi.checks.fabric_timing import FAILED, SKIPPED, FabricAnswer
from dynamo_mpi.checks.gpu_check import figures_of
from dynamo_mpi.checks.gpu_facts import visible_gpus
from dynamo_mpi.checks.gpu_health import health_of_node
from dynamo_mpi.checks.gpu_health_rules import HealthRow, check_health
from dynamo_mpi.checks.gpu_kind import kind_of
from dynamo_mpi.checks.hardware import CheckResult, EvaluationInput
from dynamo_mpi.checks.hardware_check_plan import NODE, HardwareCheckPlan
from dynamo_mpi.checks.nccl_fabric import EndedError, LateError, ProbeChild, listen
from dynamo_mpi.common.process import host_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from dynamo_mpi.checks.gpu_health import GpuHealth
    from dynamo_mpi.layout.finding import Finding


class LocalResult(NamedTuple):
    """What there is to say of this machine.

    Args:
        figures: by probe, as plain data; empty where there is no GPU.
        findings: what isn't as it has to be. A GPU is named by its number among those that are looked at.
        lines: the figures in a few words.
    """

    figures: dict[str, Any]
    findings: tuple[Finding, ...]
    lines: tuple[str, ...]


class _Place(NamedTuple):
    host: str


def check_this_host(environ: Mapping[str, str] | None = None, seconds: float = 30.0) -> LocalResult:
    """Look at all GPUs of this machine, and let those that this process may use talk over NCCL. Call it from the main thread.

    Args:
        environ: for the processes that use the GPUs; this process's own by default.
        seconds: for NCCL.
    """
    told = health_of_node()
    if not told:
        return LocalResult({}, (), ("gpu: no GPU here",))
    environ = os.environ if environ is None else environ
    host = host_name()
    usable = len(visible_gpus([one.facts for one in told if not one.problem], environ))
    findings = check_health([HealthRow(host, health) for health in told])
    figures: dict[str, Any] = {"gpu": figures_of(told)}
    lines = [f"gpu: {sum(not health.problem for health in told)} of {len(told)} GPUs read"]
    if usable > 1:
        fabric = _fabric(told, usable, environ, host, seconds, figures)
        figures["fabric"] = dict(fabric.figures)
        findings += fabric.findings
        lines.append(fabric.line)
    return LocalResult(figures, tuple(map(_of_gpus, findings)), tuple(lines))


def _fabric(
    told: Sequence[GpuHealth],
    usable: int,
    environ: Mapping[str, str],
    host: str,
    seconds: float,
    earlier: Mapping[str, Any],
) -> CheckResult:
    everybody = tuple(range(usable))
    plan = HardwareCheckPlan(("fabric",), seconds, "nccl", ((NODE, (everybody,)), ("tp", (everybody,))))
    kinds = {kind_of(one.facts.name, one.facts.sm, one.facts.total_bytes) for one in told}
    case = EvaluationInput(plan, [_Place(host)] * usable, kinds.pop() if len(kinds) == 1 else None, earlier=earlier)
    return judge_fabric(_measure(plan, usable, environ), case)


def _measure(plan: HardwareCheckPlan, size: int, environ: Mapping[str, str]) -> list[FabricAnswer]:
    began = time.monotonic()
    end = began + plan.seconds
    children = [ProbeChild(rank, size, plan, environ) for rank in range(size)]
    try:
        troubles = [""] * size
        libraries = [""] * size
        for rank, child in enumerate(children):
            try:
                libraries[rank] = str(json.loads(child.hear(end)[1])["library"])
            except (EndedError, LateError) as error:
                troubles[rank] = str(error) or f"it did not start in {plan.seconds:g} s"
        if any(troubles):
            return [FabricAnswer(FAILED if trouble else SKIPPED, trouble) for trouble in troubles]
        try:
            children[0].tell("identify")
            joined = children[0].hear(end)[1]
        except (EndedError, LateError) as error:
            return [FabricAnswer(FAILED, str(error)), *[FabricAnswer(SKIPPED)] * (size - 1)]
        for child in children:
            child.tell(f"join {joined}")
        # what they say until they are heard waits in their pipes
        return [listen(child, library, began, end) for child, library in zip(children, libraries, strict=True)]
    finally:
        for child in children:
            child.close()


def _of_gpus(finding: Finding) -> Finding:
    """Write of GPUs what the rules write of ranks."""

    def turn(text: str) -> str:
        return text.replace("ranks ", "GPUs ").replace("rank ", "GPU ")

    return replace(finding, message=turn(finding.message), found=turn(finding.found))
