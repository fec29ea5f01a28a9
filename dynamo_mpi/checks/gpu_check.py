# SPDX-License-Identifier: Apache-2.0
"""The GPU check: the health of each rank's GPU, after the memory of an earlier job step has been freed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.gpu_health import GpuHealth, health_of_rank
from dynamo_mpi.checks.gpu_health_rules import HealthRow, check_health
from dynamo_mpi.checks.gpu_rules import check_busy, is_busy
from dynamo_mpi.checks.hardware import WAIT_SHARE, CheckResult
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts, Requirements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.hardware import CheckContext, EvaluationInput

# cards: bridges join two or four of a node's by NVLink; the others have PCI Express only
_BRIDGED = re.compile(r"\b(?:PCIe|NVL)\b", re.IGNORECASE)


def measure(part: CheckContext) -> list[str]:
    """Read this rank's GPU."""
    end = part.began + part.plan.seconds * WAIT_SHARE
    return health_of_rank(part.world.rank, part.environ, is_busy, end).pack()


def judge(answers: Sequence[Sequence[str]], case: EvaluationInput) -> CheckResult:
    """Apply the rules over the GPUs' health and free memory (V2); the preflight leaves V2 to this check, after the wait."""
    gpus = [GpuHealth.unpack(answer) for answer in answers]
    rows = [HealthRow(place.host, health) for place, health in zip(case.ranks, gpus, strict=True)]
    findings = [*check_health(rows), *check_busy(_host_rows(rows), Requirements(case.weights))]
    waited = max((health.waited for health in gpus), default=0.0)
    line = f"gpu: {sum(not health.problem for health in gpus)} of {len(gpus)} GPUs read"
    line += f", waited {waited:.1f} s for memory" if waited >= 1 else ""
    return CheckResult(tuple(findings), figures_of(gpus), line)


def _host_rows(rows: Sequence[HealthRow]) -> list[RankFacts]:
    """Convert to the rows of the preflight's rules: each rank with the one GPU that it takes."""
    return [
        RankFacts(
            rank,
            row.host,
            HostFacts(speaks_for_node=False, mpi_library=""),
            NodeGpus((row.health.facts,), (row.health.facts.uuid,)) if not row.health.problem else NodeGpus(),
        )
        for rank, row in enumerate(rows)
    ]


def figures_of(gpus: Sequence[GpuHealth]) -> dict[str, Any]:
    """Return a summary whose size doesn't depend on the number of GPUs: the extremes, or one value if it is the same on all."""

    def extremes(values: Sequence[int | None]) -> list[int] | int | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        return min(known) if min(known) == max(known) else [min(known), max(known)]

    read = [health for health in gpus if not health.problem]
    bridged = any(health.links_up and _BRIDGED.search(health.facts.name) for health in read)
    return {
        **({"bridged": True} if bridged else {}),
        "gpus": len(read),
        "driver": sorted({health.driver for health in read}),
        "free_mib": extremes([health.facts.free_bytes >> 20 for health in read]),
        "sm_mhz": extremes([health.sm_mhz for health in read]),
        "power_watts": extremes(
            [None if health.power_limit is None else health.power_limit // 1000 for health in read]
        ),
        "nvlinks_up": extremes([health.links_up for health in read]),
        "pcie_generation": extremes([health.pcie_generation for health in read]),
        "uncorrected": sum(health.uncorrected or 0 for health in read),
        "waited": max((health.waited for health in read), default=0.0),
    }
