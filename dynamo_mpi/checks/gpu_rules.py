# SPDX-License-Identifier: Apache-2.0
"""Rules over the GPUs themselves, and the kind of the ranks' GPUs; `gpu_visibility` has the rules over which rank sees which. Pure; rank 0
only.

| rule | requirement | |
|---|---|---|
| G6 | one architecture in the world, and equally many GPUs on each node | error |
| G6 | GPUs of one product and one size | warning |
| V6 | one driver, with one supported CUDA version, on all nodes | warning |
| V8 | no GPU is cut into instances (MIG) | error |
| V16 | every GPU has joined its NVLink fabric, is healthy there, and over nodes all are in one clique | warning |
| V2 | a rank's weights fit into what is free | error |
| V2 | no other process holds memory on a rank's GPU | warning |
"""

from __future__ import annotations

import re

from dynamo_mpi.checks import gpu_visibility as visibility_rules
from dynamo_mpi.checks.gpu_visibility import agree
from dynamo_mpi.checks.rank_facts import by_host, groups, lines, on_hosts, where
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.format import counted, gib, listed
from dynamo_mpi.layout.gpus import GPUS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus
    from dynamo_mpi.checks.rank_facts import RankFacts, Requirements
    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.gpus import Gpu

# drivers reserve different amounts
_SAME_MEMORY = 0.03


def kind_in(rows: Iterable[RankFacts]) -> str | None:
    """Return the kind of all GPUs that ranks see; None if there are several kinds, or if the kind isn't known."""
    kinds = {kind_of(gpu.name, gpu.sm, gpu.total_bytes) for row in rows for gpu in row.gpus.visible_gpus}
    return kinds.pop() if len(kinds) == 1 else None


def kind_of(name: str, sm: int, total_bytes: int) -> str | None:
    """Return a GPU's kind, as for ``--gpu``; None if it isn't known.

    Architecture and memory must be those of the kind. The product's name decides between kinds that share both, and if the memory isn't
    known; if the name is another kind's, as for an H100 with an H200's memory, the result is None.

    Args:
        name: as NVML reports it: ``NVIDIA H100 80GB HBM3``.
        sm: compute capability, times ten.
        total_bytes: memory; 0 if it isn't known.
    """
    words = f"-{re.sub('[^a-z0-9]+', '-', name.lower())}-"
    alike = [
        gpu
        for gpu in GPUS.values()
        if gpu.sm == sm and (not total_bytes or abs(gpu.memory - total_bytes) <= gpu.memory * _SAME_MEMORY)
    ]
    named = [gpu for gpu in alike if f"-{_product(gpu)}-" in words]
    if named:
        return named[0].name if len(named) == 1 else None
    other = any(f"-{_product(gpu)}-" in words for gpu in GPUS.values())
    return alike[0].name if len(alike) == 1 and total_bytes and not other else None


def _product(gpu: Gpu) -> str:
    """Return the product's name, which two sizes of memory may share: an ``a100-40`` is an A100."""
    front = gpu.name.rpartition("-")[0]
    return front if front in GPUS else gpu.name


_GIB = 2**30
# daemons hold some MiB of an idle GPU; with more than this, another process computes on it
_BUSY_BYTES, _BUSY_SHARE = _GIB, 0.02
# products of one memory size differ by reserves and spare rows
_SAME_MEMORY = 0.03


def check_gpus(rows: Sequence[RankFacts], needs: Requirements) -> list[Finding]:
    """Apply every rule about GPUs, unless they are left out; if a rank sees no GPU, only that is reported."""
    if needs.allow_no_gpu or not rows:
        return []
    findings = [finding for rule in visibility_rules.RULES for finding in rule(rows)]
    if not any(row.gpus.visible for row in rows):
        return findings
    for rule in (check_alike, check_counts, check_drivers, check_instances, check_nvlink_fabric):
        findings += rule(rows)
    return findings if needs.memory_later else [*findings, *check_busy(rows, needs)]


def check_alike(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """G6: all GPUs of the world have one architecture, or ranks pick different kernels and hang; they should be one product."""
    kinds: dict[tuple[int, str, int], list[str]] = {}
    for row in rows:
        for gpu in row.gpus.visible_gpus:
            kinds.setdefault((gpu.sm, gpu.name, gpu.total_bytes), []).append(row.host)
    found = groups({_kind(sm, name, size): hosts for (sm, name, size), hosts in kinds.items()})
    sizes = [size for _, _, size in kinds if size]
    if len({sm for sm, _, _ in kinds}) > 1:
        yield error(
            "G6",
            "the GPUs are of different architectures",
            found=found,
            expected="one architecture in the world: each rank picks its kernels by its own GPU, and collectives hang where they differ",
            fix="ask for nodes of one kind (sbatch --constraint=..., --gres=gpu:h100:8), and on a mixed node set CUDA_VISIBLE_DEVICES",
        )
    elif sizes and min(sizes) < max(sizes) * (1 - _SAME_MEMORY):
        yield warning(
            "G6",
            "the GPUs have different amounts of memory",
            found=found,
            expected="the same on every rank: the smallest decides how many tokens the KV cache holds on all",
            fix="ask for nodes of one kind (sbatch --constraint=..., --gres=gpu:h100:8)",
        )
    elif len({name for _, name, _ in kinds}) > 1:
        yield warning(
            "G6",
            "the GPUs are of different products",
            found=found,
            expected="one product: the slowest sets the pace, and each rank tunes its kernels by itself",
            fix="ask for nodes of one kind (sbatch --constraint=...)",
        )


def _kind(sm: int, name: str, size: int) -> str:
    return f"{name}, SM{sm}, {gib(size)}" if size else f"{name}, SM{sm}"


def check_counts(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """G6, A10: every node has the same number of visible GPUs; the engine has one number for all (``gpus_per_node``)."""
    counts: dict[str, list[str]] = {}
    for host, some in by_host(rows).items():
        if some[0].gpus.visible and agree(some):
            counts.setdefault(counted(len(some[0].gpus.visible), "GPU"), []).append(host)
    if len(counts) > 1:
        yield error(
            "G6",
            "the nodes show unequal numbers of GPUs",
            found=groups(counts),
            expected="the same number on each node: the engine takes rank // gpus_per_node for the node",
            fix="srun --gpus-per-node=N for all nodes; drain a node that has lost a GPU",
        )


def check_drivers(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V6: one driver on all nodes; NCCL has hung where they differ."""
    drivers: dict[str, list[str]] = {}
    for row in rows:
        if row.gpus.driver:
            drivers.setdefault(describe_driver(row.gpus), []).append(row.host)
    if len(drivers) > 1:
        yield warning(
            "V6",
            "the nodes have different NVIDIA drivers",
            found=groups(drivers),
            expected="one driver everywhere, new enough for the container's CUDA",
            fix="leave the odd nodes out (sbatch --exclude=...), or have them updated",
        )


def describe_driver(gpus: NodeGpus) -> str:
    """Format a driver with the newest CUDA that it supports."""
    return f"{gpus.driver} (CUDA {gpus.cuda // 1000}.{gpus.cuda % 1000 // 10})" if gpus.cuda else gpus.driver


def check_instances(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V8: no GPU is split into instances (MIG): they can't reach each other, so no group of ranks can span them."""
    cut = [
        row
        for row in rows
        if any(gpu.mig for gpu in row.gpus.visible_gpus) or any(name.startswith("MIG-") for name in row.gpus.visible)
    ]
    if cut:
        yield error(
            "V8",
            f"GPUs are split into instances (MIG): {where(cut, rows)}",
            found=f"MIG is on, on {on_hosts(row.host for row in cut)}",
            expected="whole GPUs: NCCL needs access to other GPUs' memory, which instances don't have",
            fix="ask for whole GPUs (--gres=gpu:...), or as root: nvidia-smi -mig 0",
        )


def check_nvlink_fabric(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    """V16: every GPU has joined its NVLink fabric and is healthy there; over nodes all are in one clique."""
    places = {gpu.uuid: (row.host, gpu, gpu.fabric) for row in rows for gpu in row.gpus.visible_gpus if gpu.fabric}
    late = [f"GPU {gpu.number} on {host}: {fabric.problem}" for host, gpu, fabric in places.values() if fabric.problem]
    if late:
        yield warning(
            "V16",
            f"{counted(len(late), 'GPU')} {'has' if len(late) == 1 else 'have'} not joined the NVLink fabric",
            found=lines(late),
            expected="registration completed: until then CUDA may refuse to start (error 802), and NVLink is not used",
            fix="nvidia-smi -q | grep -A4 Fabric; see that the fabric manager, or on NVL72 the NMX controller, runs",
        )
    unwell = [
        f"GPU {gpu.number} on {host}: {listed(fabric.faults)}" for host, gpu, fabric in places.values() if fabric.faults
    ]
    if unwell:
        yield warning(
            "V16",
            f"the NVLink fabric reports faults of {counted(len(unwell), 'GPU')}",
            found=lines(unwell),
            expected="a healthy fabric: NCCL is slower over it, or fails at its start",
            fix="take other nodes (sbatch --exclude=...), and report these: nvidia-smi -q shows Fabric, Health",
        )
    domains: dict[str, list[str]] = {}
    for row in rows:
        for gpu in row.gpus.visible_gpus:
            domain = gpu.fabric.domain if gpu.fabric and not gpu.fabric.problem else ""
            domains.setdefault(domain or "no clique", []).append(row.host)
    if len(domains) < 2 or set(domains) == {"no clique"} or len({row.host for row in rows}) < 2:
        return
    most = max(domains, key=lambda name: len(domains[name]))
    odd = on_hosts(host for name, hosts in domains.items() if name != most for host in hosts)
    yield warning(
        "V16",
        f"NVLink doesn't join all nodes: the GPUs are in {counted(len(domains), 'clique')}, those of {odd} apart from the others",
        found=groups(domains),
        expected="one clique of one cluster: between cliques NCCL uses the network, and TensorRT-LLM's all-to-all over NVLink fails",
        fix="ask for nodes of one NVLink domain (sbatch --segment=N or --switches=1), or leave the odd ones out (--exclude=...)",
    )


def check_busy(rows: Sequence[RankFacts], needs: Requirements) -> Iterator[Finding]:
    """V2: each rank's GPU has enough free memory for the rank's weights, and no other process computes on it."""
    full: list[str] = []
    busy: dict[str, str] = {}
    for row in rows:
        gpu = row.gpus.facts_of(row.gpus.taken_by(row.rank))
        if gpu is None or not gpu.total_bytes:
            continue
        described = (
            f"rank {row.rank} on {row.host}, GPU {gpu.number}: {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
        )
        needed = needs.weights[row.rank] if row.rank < len(needs.weights) else 0
        if gpu.free_bytes < needed:
            full.append(f"{described}, its weights take {gib(needed)}; {describe_holders(gpu)}")
        elif is_busy(gpu):
            busy.setdefault(gpu.uuid, f"{described}; {describe_holders(gpu)}")
    fix = "end the processes that hold it, or take other nodes; nvidia-smi on the node shows them"
    if full:
        message = f"the weights don't fit into what is free on the GPU of {counted(len(full), 'rank')}"
        yield error(
            "V2", message, found=lines(full), expected="room for the rank's weights, and for the KV cache", fix=fix
        )
    if busy:
        message = f"{counted(len(busy), 'GPU')} {'is' if len(busy) == 1 else 'are'} in use by others"
        needed_text = "free GPUs: the fullest one decides how many tokens the KV cache holds on all ranks"
        yield warning("V2", message, found=lines([*busy.values()]), expected=needed_text, fix=fix)


def is_busy(gpu: GpuFacts) -> bool:
    """Return whether a process computes on it."""
    return gpu.used_bytes > min(_BUSY_BYTES, gpu.total_bytes * _BUSY_SHARE)


def describe_holders(gpu: GpuFacts) -> str:
    """Name the processes that hold its memory, if they can be seen."""
    if not gpu.used_bytes:
        return "no process holds memory"
    if not gpu.holders:
        return f"{gib(gpu.used_bytes)} held by processes that can't be seen from here (another container?)"
    return listed(f"pid {pid} holds {gib(size)}" if size else f"pid {pid}" for pid, size in gpu.holders)


RULES = (
    *visibility_rules.RULES,
    check_alike,
    check_counts,
    check_drivers,
    check_instances,
    check_nvlink_fabric,
    check_busy,
)
