# SPDX-License-Identifier: Apache-2.0
"""The GPU check: the health of each rank's GPU, after the memory of an earlier job step has been freed, and the rules over it.

The rules are pure, and rank 0 runs them; the preflight has those over the GPUs' visibility.

| rule | requirement | |
|---|---|---|
| V9 | the driver asks for no recovery of a GPU | warning |
| V10 | memory has no uncorrectable errors, and no rows that wait for replacement | warning |
| V11 | no GPU is slowed down by its hardware, heat or power | warning |
| V12 | every NVLink is up | warning |
| V13 | any process may use a GPU | error where none may, warning where one may |
| V14 | no GPU is unlike the others | warning |
| V15 | the health of every GPU can be read | warning |
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.gpu_health import GpuHealth, health_of_rank
from dynamo_mpi.checks.gpu_rules import check_busy, is_busy
from dynamo_mpi.checks.hardware import WAIT_SHARE, CheckContext, CheckResult, EvaluationInput
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts, Requirements, lines
from dynamo_mpi.layout.finding import Finding, error, warning
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.mpi.placement import describe_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# NVML_GPU_RECOVERY_ACTION_* of nvml.h
_ACTIONS = {
    1: "a reset of the GPU",
    2: "a reboot of the node",
    3: "that peer-to-peer traffic to it is drained",
    4: "that it is drained and reset",
    5: "that the IMEX domain is recovered",
    6: "a reset of its bus",
    7: "a reboot of the system",
}
# nvmlClocksEventReason* of nvml.h; idleness, application clocks and a power cap aren't problems
_SLOW = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
_PROHIBITED, _EXCLUSIVE = 2, 3


class HealthRow(NamedTuple):
    """One rank, its host and its GPU.

    Args:
        host: its node's name.
        health: its GPU's health.
    """

    host: str
    health: GpuHealth


def check_health(rows: Sequence[HealthRow]) -> list[Finding]:
    """Apply every rule; the rows stand in rank order."""
    return [finding for rule in RULES for finding in rule(rows)]


def check_recovery(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V9: the driver asks for no recovery of a GPU (`NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`). A GPU that needs recovery may fail at any
    time."""

    def problem_of(one: GpuHealth) -> str:
        action = one.recovery_action
        return f"the driver wants {_ACTIONS.get(action, f'action {action}')}" if action else ""

    if affected := _affected(rows, problem_of):
        yield warning(
            "V9",
            f"GPUs need recovery: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected='recovery action "None" in nvidia-smi -q',
            fix="recover the GPU as the driver asks (nvidia-smi --gpu-reset, or a reboot), or exclude the nodes: "
            f"sbatch --exclude={_hosts(affected, rows)}",
        )


def check_memory_errors(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V10: no uncorrected ECC error since the driver's start, no row of memory that waits for a reset, none that could not be replaced
    (`nvmlDeviceGetTotalEccErrors`, `nvmlDeviceGetRemappedRows`)."""

    def problem_of(one: GpuHealth) -> str:
        parts = [f"{one.uncorrected} uncorrected ECC errors" if one.uncorrected else ""]
        parts += ["rows wait for a reset to be replaced" if one.remap_pending else ""]
        parts += ["a row could not be replaced" if one.remap_failed else ""]
        return listed(filter(None, parts))

    if affected := _affected(rows, problem_of):
        yield warning(
            "V10",
            f"GPUs have errors in their memory: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected="none: the next one ends the engine (XID 48, 63, 64, 94, 95)",
            fix="reset the GPU (nvidia-smi --gpu-reset); replace a GPU whose row could not be remapped: "
            f"exclude the nodes until then, sbatch --exclude={_hosts(affected, rows)}",
        )


def check_slowdown(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V11: no GPU is slowed down by its hardware, by heat or by a power brake
    (`nvmlDeviceGetCurrentClocksEventReasons`): all ranks wait for the slowest."""

    def problem_of(one: GpuHealth) -> str:
        return listed(name for bit, name in _SLOW.items() if (one.slow_reasons or 0) & bit)

    if affected := _affected(rows, problem_of):
        yield warning(
            "V11",
            f"GPUs are slowed down: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected="full clocks: all ranks wait for the slowest",
            fix=f"look at cooling and power (nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER), or leave {_hosts(affected, rows)} out",
        )


def check_links(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V12: every NVLink of a GPU is up (`nvmlDeviceGetNvLinkState`); if no GPU has one that is up, the node has no NVLink."""
    if not any(row.health.links_up for row in rows):
        return
    most = max(row.health.links or 0 for row in rows)

    def problem_of(one: GpuHealth) -> str:
        if one.problem or one.links_up is None or one.links_up == most:
            return ""
        return f"{one.links_up} of {max(most, one.links or 0)} NVLinks are up"

    if affected := _affected(rows, problem_of):
        yield warning(
            "V12",
            f"NVLinks are down: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected="all NVLinks up: tensor parallelism runs at the rate of the slowest",
            fix="nvidia-smi nvlink -s on the node; see that the fabric manager runs (systemctl status nvidia-fabricmanager); "
            f"or leave {_hosts(affected, rows)} out",
        )


def check_compute_mode(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V13: any process may use a rank's GPU (`nvmlDeviceGetComputeMode`): if none may, nothing can be loaded; if only one may,
    the engine's helper processes can't."""
    prohibited = _affected(rows, lambda one: "compute mode Prohibited" if one.compute_mode == _PROHIBITED else "")
    if prohibited:
        yield error(
            "V13",
            f"no process may use the GPU: {_name(prohibited, rows)}",
            found=lines([*prohibited.values()]),
            expected="compute mode Default",
            fix="as root on the node: nvidia-smi -c DEFAULT",
        )
    single = _affected(rows, lambda one: "compute mode Exclusive_Process" if one.compute_mode == _EXCLUSIVE else "")
    if single:
        yield warning(
            "V13",
            f"only one process may use the GPU: {_name(single, rows)}",
            found=lines([*single.values()]),
            expected="compute mode Default: a second process, such as a helper of the engine or a hardware check, gets an error",
            fix="as root on the node: nvidia-smi -c DEFAULT",
        )


_FACETS: tuple[tuple[str, Callable[[GpuHealth], object]], ...] = (
    ("highest SM clock", lambda one: None if one.sm_mhz is None else f"{one.sm_mhz} MHz"),
    ("highest memory clock", lambda one: None if one.memory_mhz is None else f"{one.memory_mhz} MHz"),
    ("power limit", lambda one: None if one.power_limit is None else f"{one.power_limit / 1000:.0f} W"),
    ("PCI Express", lambda one: _pcie(one)),
    ("ECC", lambda one: None if one.ecc_on is None else "on" if one.ecc_on else "off"),
    ("NVLinks", lambda one: one.links),
)


def check_odd(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V14: highest clocks, power limits, PCI Express generations and lanes, ECC and numbers of NVLinks are the same on all GPUs. Drivers,
    products, architectures and memory are the preflight's (V6, G6)."""
    odd: dict[int, list[str]] = {}
    for what, facet in _FACETS:
        values = {rank: facet(row.health) for rank, row in enumerate(rows) if not row.health.problem}
        known = Counter(value for value in values.values() if value is not None)
        if len(known) < 2:
            continue
        usual = known.most_common(1)[0][0]
        for rank, value in values.items():
            if value is not None and value != usual:
                odd.setdefault(rank, []).append(f"{what} {value} instead of {usual}")
    if odd:
        affected = {rank: f"{_gpu(rank, rows)}: {listed(parts)}" for rank, parts in odd.items()}
        yield warning(
            "V14",
            f"GPUs are unlike the others: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected="GPUs of one make with the same settings: all ranks wait for the slowest",
            fix="nvidia-smi -q on both; set what can be set (nvidia-smi -pl, -e), reseat a card with too few lanes, or leave the node out",
        )


def check_readable(rows: Sequence[HealthRow]) -> Iterator[Finding]:
    """V15: NVML reports every rank's GPU; otherwise its health isn't known."""
    affected = {
        rank: f"{describe_ranks([rank], rows)}: {row.health.problem}"
        for rank, row in enumerate(rows)
        if row.health.problem
    }
    if affected:
        yield warning(
            "V15",
            f"the health of GPUs isn't known: {_name(affected, rows)}",
            found=lines([*affected.values()]),
            expected="NVML and a GPU in every rank; where a node has several kinds, CUDA_DEVICE_ORDER=PCI_BUS_ID",
            fix="pip install nvidia-ml-py where it is missing, give the rank a GPU (K9); --probe fabric leaves the GPUs out",
        )


def _pcie(one: GpuHealth) -> str | None:
    if one.pcie_generation is None or one.pcie_width is None:
        return None
    return f"generation {one.pcie_generation} x{one.pcie_width}"


def _affected(rows: Sequence[HealthRow], problem_of: Callable[[GpuHealth], str]) -> dict[int, str]:
    """Return, by rank, the problem of its GPU."""
    found = {rank: problem_of(row.health) for rank, row in enumerate(rows)}
    return {rank: f"{_gpu(rank, rows)}: {text}" for rank, text in found.items() if text}


def _gpu(rank: int, rows: Sequence[HealthRow]) -> str:
    return f"{describe_ranks([rank], rows)}, GPU {rows[rank].health.facts.number}"


def _name(affected: dict[int, str], rows: Sequence[HealthRow]) -> str:
    return describe_ranks(sorted(affected), rows)


def _hosts(affected: dict[int, str], rows: Sequence[HealthRow]) -> str:
    return ",".join(dict.fromkeys(rows[rank].host for rank in sorted(affected)))


RULES = (
    check_recovery,
    check_memory_errors,
    check_slowdown,
    check_links,
    check_compute_mode,
    check_odd,
    check_readable,
)


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
    line = f"gpu: {sum(not health.problem for health in gpus)} of {counted(len(gpus), 'GPU')} read"
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
