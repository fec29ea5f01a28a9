# SPDX-License-Identifier: Apache-2.0
"""The fabric check: messages between ranks arrive, unchanged, and as fast as between comparable ranks."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from dynamo_mpi.checks.fabric_rules import FabricCase, check_fabric
from dynamo_mpi.checks.fabric_steps import FabricAnswer, gather_up, steps_of
from dynamo_mpi.checks.hardware import CheckResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.fabric_steps import Measured, Step
    from dynamo_mpi.checks.hardware import CheckContext, EvaluationInput

_GB = 1e9
# NVLink: a quarter of one direction of NVIDIA's figure for the GPU (product pages: A100 600 GB/s, H100, H200, H20 and GH200 900 GB/s,
# B200, GB200, B300 and GB300 1800 GB/s, both directions together). docs/guides/probe.md has measurements of two H200s. PCI Express: an
# eighth of what the generation carries over 16 lanes one way (PCI-SIG: 16, 32, 64 GB/s for generations 3, 4, 5), since messages may go
# over the host's memory. A lower bandwidth means that a link is down or missing; tuning doesn't explain it.
_NVLINK = {
    "a100": 300 * _GB,
    "a100-40": 300 * _GB,
    "h100": 450 * _GB,
    "h200": 450 * _GB,
    "h20": 450 * _GB,
    "gh200": 450 * _GB,
    "b200": 900 * _GB,
    "gb200": 900 * _GB,
    "b300": 900 * _GB,
    "gb300": 900 * _GB,
}
_PCIE = {3: 16 * _GB, 4: 32 * _GB, 5: 64 * _GB, 6: 128 * _GB}


def least_rate(kind: str | None, nvlinks: int | None, pcie: int | None) -> tuple[float, str] | None:
    """Return the lowest acceptable bytes per second and the name of the link; None if they aren't known.

    Args:
        kind: as `layout.gpus` names it.
        nvlinks: links of the GPU that are up; None if that isn't known.
        pcie: generation of PCI Express; None if it isn't known.
    """
    if nvlinks and kind in _NVLINK:
        return _NVLINK[kind] / 4, f"NVLink of {kind}"
    if nvlinks == 0 and pcie in _PCIE:
        return _PCIE[pcie] / 8, f"PCI Express {pcie}"
    return None


def measure(part: CheckContext) -> list[str]:
    """Measure this rank's part. Collective."""
    if part.plan.over == "nccl":
        from dynamo_mpi.checks.nccl_fabric import measure_over_nccl

        return measure_over_nccl(part.world, part.plan, part.environ, part.began).pack()
    from dynamo_mpi.checks.mpi_fabric import measure_over_mpi

    return measure_over_mpi(part.world, steps_of(part.plan), part.began).pack()


def judge(answers: Sequence[Sequence[str]], case: EvaluationInput) -> CheckResult:
    """Apply the rules to the measurements."""
    return judge_fabric([FabricAnswer.unpack(answer) for answer in answers], case)


def judge_fabric(answers: Sequence[FabricAnswer], case: EvaluationInput) -> CheckResult:
    """Apply the rules.

    Args:
        answers: the ranks' measurements, in rank order.
        case: the world; if the GPU check ran before, the links that it found decide what is expected.
    """
    steps = steps_of(case.plan)
    measured = gather_up(steps, answers)
    gpus = case.earlier.get("gpu", {})
    nvlinks = None if gpus.get("bridged") else _least(gpus.get("nvlinks_up"))
    links = nvlinks, _least(gpus.get("pcie_generation"))
    least = least_rate(case.kind, *links) if case.plan.over == "nccl" else None
    findings = check_fabric(FabricCase(measured, answers, case.ranks, steps, case.plan.seconds, case.plan.over, least))
    figures = figures_of(steps, measured, answers, case.plan.over)
    return CheckResult(tuple(findings), figures, _line(steps, measured, figures))


def _least(extremes: list[int] | int | None) -> int | None:
    return extremes[0] if isinstance(extremes, list) else extremes


def figures_of(
    steps: Sequence[Step], measured: Sequence[Measured], answers: Sequence[FabricAnswer], over: str
) -> dict[str, Any]:
    """Return a summary whose size doesn't depend on the number of ranks: by operation and kind of group, the slowest and the median
    bus bandwidth in GB/s at the largest size, the latency in microseconds at the smallest, and the slowest ranks."""
    kinds: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(_name(step) for step in steps):
        of_kind = [one for one in measured if _name(one.step) == name]
        large = [one for one in of_kind if one.size == one.step.sizes[-1]]
        small = [one for one in of_kind if one.size == one.step.sizes[0]]
        if large and small:
            slowest = min(large, key=lambda one: one.rate)
            kinds[name] = {
                "bytes": slowest.size,
                "gbps": [round(slowest.rate / 1e9, 3), round(median(one.rate for one in large) / 1e9, 3)],
                "us": [
                    round(1e6 * median(one.seconds for one in small), 1),
                    round(1e6 * max(one.seconds for one in small), 1),
                ],
                "slowest": list(slowest.group[:2])
                if len(slowest.group) == 2
                else [slowest.group[0], slowest.group[-1]],
            }
    return {
        "over": over,
        "library": next((answer.library for answer in answers if answer.library), ""),
        "network": sorted({answer.network for answer in answers if answer.network}),
        "links": sorted({link for answer in answers for link in answer.links}),
        "begin": round(max((answer.begin for answer in answers), default=0.0), 3),
        "kinds": kinds,
    }


def _name(step: Step) -> str:
    return f"{step.operation} {step.kind}"


def _line(steps: Sequence[Step], measured: Sequence[Measured], figures: dict[str, Any]) -> str:
    if not measured:
        return "fabric: nothing measured"
    parts = [f"{name} {kind['gbps'][0]:.1f} GB/s, {kind['us'][0]:.0f} µs" for name, kind in figures["kinds"].items()]
    return f"fabric over {figures['library']}: {'; '.join(parts)}"
