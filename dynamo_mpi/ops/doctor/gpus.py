# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of the GPUs, by NVML; a machine without any, such as a login node, has no problem.

``python -m dynamo_mpi.ops.doctor.gpus`` reads the facts in a process of its own, and writes them as JSON: a call about a GPU that has
fallen off the bus may hang in the driver.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.gpu_facts import NodeGpus, device_files, read_gpus
from dynamo_mpi.checks.gpu_health import GpuHealth, health_of_gpus
from dynamo_mpi.checks.gpu_rules import (
    check_alike,
    check_instances,
    check_nvlink_fabric,
    describe_driver,
    describe_holders,
    is_busy,
)
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts, lines
from dynamo_mpi.layout.format import counted, gib, listed
from dynamo_mpi.ops.doctor.binding import check_places
from dynamo_mpi.ops.doctor.check import (
    Check,
    Context,
    Probe,
    Section,
    error_or_warning,
    of_finding,
    ok,
    skipped,
    warning,
)
from dynamo_mpi.ops.doctor.commands import Output, run_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# without a persistence daemon, NVML's initialisation on a node with eight GPUs takes seconds
_LOOK_SECONDS = 60.0


class GpuLook(NamedTuple):
    """The facts about this node's GPUs.

    Args:
        facts: the facts that a rank reports.
        devices: number of the driver's device files.
        health: each GPU's health.
    """

    facts: NodeGpus
    devices: int = 0
    health: tuple[GpuHealth, ...] = ()


def check_gpus(context: Context) -> Iterator[Check]:
    """Read NVML in a separate process, and evaluate the facts."""
    output = run_module("dynamo_mpi.ops.doctor.gpus", context.environ, context.left(_LOOK_SECONDS))
    look = read_look(output)
    if isinstance(look, str):
        needed = "an answer of NVML: the preflight of --engine trtllm looks in the same way"
        yield warning("nvml", look, needed, "nvidia-smi; a GPU that hangs shows in dmesg as Xid")
        return
    host = socket.gethostname()
    yield from judge(look, host, in_rank=context.in_rank)
    yield from check_places(context, look.facts, host)


def read_look(output: Output) -> GpuLook | str:
    """Return the facts from the child's output, or why there are none."""
    if output.problem:
        return f"looking at the GPUs: {output.problem}"
    try:
        output_facts: dict[str, Any] = json.loads(output.out.strip().splitlines()[-1])
        health = tuple(GpuHealth.unpack(one) for one in output_facts["health"])
        return GpuLook(NodeGpus.unpack(output_facts["facts"]), int(output_facts["devices"]), health)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        return f"looking at the GPUs: an answer that can't be read ({type(error).__name__})"


def judge(look: GpuLook, host: str, *, in_rank: bool) -> Iterator[Check]:
    """Evaluate the GPUs of one node."""
    facts = look.facts
    if facts.problem:
        yield judge_problem(look, in_rank=in_rank)
    if not facts.gpus:
        if not facts.problem:
            yield skipped("nvml", "NVML shows no GPU", "ask Slurm for some: --gpus-per-node=N")
        return
    kinds = listed(dict.fromkeys(f"{gpu.name}, {gib(gpu.total_bytes)}" for gpu in facts.gpus))
    yield ok("gpus", f"{counted(len(facts.gpus), 'GPU')} ({kinds})")
    yield ok("driver", describe_driver(facts) or "of unknown version")
    yield judge_visible(facts, in_rank=in_rank)
    row = RankFacts(0, host, HostFacts(False, ""), facts)
    for id, rule in (("alike", check_alike), ("mig", check_instances)):
        yield from (of_finding(id, finding) for finding in rule([row]))
    yield from judge_fabric(row)
    yield judge_memory(facts)
    yield judge_links(look.health)
    yield judge_ecc(look.health)


def judge_problem(look: GpuLook, *, in_rank: bool) -> Check:
    """Evaluate NVML's problem; a machine without GPUs has none."""
    if not look.devices and not look.facts.gpus:
        return skipped("nvml", look.facts.problem)
    needed = "NVML's answer for each GPU: --engine trtllm looks at them before anything is loaded (V1)"
    fix = "pip install nvidia-ml-py; nvidia-smi shows what is wrong with a GPU or its driver"
    return error_or_warning("nvml", look.facts.problem, needed, fix, fatal=in_rank)


def judge_visible(facts: NodeGpus, *, in_rank: bool) -> Check:
    """Evaluate which GPUs CUDA would give this process."""
    visible, there = len(facts.visible), len(facts.gpus)
    if visible == there:
        return ok("visible", f"all {there}" if there > 1 else "it is visible")
    needed = "all GPUs of the node in every rank (K9)"
    fix = "unset CUDA_VISIBLE_DEVICES, or leave it to Slurm: srun --gpus-per-node=N"
    found = f"CUDA_VISIBLE_DEVICES leaves {visible} of {counted(there, 'GPU')}"
    return error_or_warning("visible", found, needed, fix, fatal=in_rank and not visible)


def judge_fabric(row: RankFacts) -> Iterator[Check]:
    """Check whether the GPUs have joined their NVLink fabric, and report its clique."""
    found = [of_finding("fabric", finding) for finding in check_nvlink_fabric([row])]
    fabrics = [gpu.fabric for gpu in row.gpus.gpus if gpu.fabric is not None]
    if found or not fabrics:  # GPUs without NVSwitches have none
        yield from found
        return
    domains = listed(dict.fromkeys(fabric.domain or "NVLink stays in the node" for fabric in fabrics))
    yield ok("fabric", f"{counted(len(fabrics), 'GPU')} registered and healthy: {domains}")


def judge_memory(facts: NodeGpus) -> Check:
    """Check whether processes hold GPU memory."""
    busy = [
        f"GPU {gpu.number}: {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free; {describe_holders(gpu)}"
        for gpu in facts.gpus
        if is_busy(gpu)
    ]
    if not busy:
        return ok("memory", "free")
    needed = "free GPUs, unless a worker of yours runs there: the fullest one decides how many tokens the KV cache of all ranks holds (V2)"
    return warning("memory", lines(busy), needed, "end the processes that hold it, or take other nodes")


def judge_links(health: Sequence[GpuHealth]) -> Check:
    """Check whether all NVLinks are up."""
    linked = [one for one in health if one.links]
    if not linked:
        return skipped("nvlink", "no NVLink: ranks of this node reach each other by PCIe")
    down = [f"GPU {one.facts.number}: {one.links_up} of {one.links} up" for one in linked if one.links_up != one.links]
    if down:
        needed = "all links: NCCL takes a slower way, or none"
        return warning(
            "nvlink",
            lines(down),
            needed,
            "nvidia-smi nvlink --status; on NVSwitch systems the fabric manager has to run",
        )
    return ok("nvlink", f"{counted(sum(one.links or 0 for one in linked), 'link')} up")


def judge_ecc(health: Sequence[GpuHealth]) -> Check:
    """Check for memory errors."""
    found = []
    for one in health:
        said = [f"{one.uncorrected} uncorrected memory errors"] if one.uncorrected else []
        said += ["a row could not be remapped"] if one.remap_failed else []
        said += ["a row is remapped at the next reset"] if one.remap_pending else []
        found += [f"GPU {one.facts.number}: {listed(said)}"] if said else []
    if found:
        needed = "none: a process that meets one is ended (Xid 48, 94, 95)"
        return warning("ecc", lines(found), needed, "nvidia-smi --query-remapped-rows; have the GPU reset, or replaced")
    return ok("ecc", "no uncorrected errors")


SECTION = Section("gpus", (Probe("nvml", check_gpus),))


def look_by_nvml() -> dict[str, Any]:
    """Read everything, for `read_look`."""
    facts = read_gpus(os.environ)
    health = health_of_gpus(facts.gpus) if facts.gpus else []
    return {"facts": facts.pack(), "devices": device_files(), "health": [one.pack() for one in health]}


if __name__ == "__main__":
    print(json.dumps(look_by_nvml()))
