# SPDX-License-Identifier: Apache-2.0
"""Decides where each rank of a TensorRT-LLM worker runs, and where it allocates: on its GPU's CPUs and memory node. Pure; rank 0 runs it.

| rule | requirement | |
|---|---|---|
| V17 | each rank runs on the CPUs next to its GPU | warning |

A rank that launcher or user have bound keeps its CPUs. Ranks whose GPUs are next to the same CPUs share them, as with TensorRT-LLM's own
binding (``configure_cpu_affinity``): it begins later, when MPI's and UCX's threads run and memory is allocated, and binds no memory.
With ``TLLM_NUMA_AWARE_WORKER_AFFINITY`` the user decides about it: with 1 the engine binds too, to the same CPUs;
with any other value nothing binds.
"""

from __future__ import annotations

from dynamo_mpi.checks.bind_rank import BOUND, ENGINE_VARIABLE, FITS
from dynamo_mpi.checks.gpu_place import GpuPlace
from dynamo_mpi.checks.rank_facts import lines, where
from dynamo_mpi.common.affinity import format_list, parse_list
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.layout.finding import warning
from dynamo_mpi.mpi.placement import spans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.layout.finding import Finding

WRONG, FEW, SAME, LEFT, UNKNOWN = "wrong", "few", "same", "left", "unknown"
"""What else becomes of a rank's CPUs: its launcher's are wrong; too few of its GPU's are allowed; all are next to its GPU; the user decides;
its GPU's place isn't known. They stay as they are. In any case a rank's memory is kept out of the GPUs' own nodes."""


class RankBinding(NamedTuple):
    """One rank's CPUs and memory.

    Args:
        kind: `BOUND` and others.
        cpus: the CPUs on which it will run, as a list.
        node: the memory node next to its GPU; -1 if it isn't known.
        host_nodes: all memory nodes but the GPUs' own, as a list, where these are NUMA nodes; otherwise empty.
    """

    kind: str
    cpus: str = ""
    node: int = -1
    host_nodes: str = ""


def decide(rows: Sequence[RankFacts], *, bind: bool) -> tuple[RankBinding, ...]:
    """Return each rank's binding.

    Args:
        rows: the ranks' facts, in rank order.
        bind: whether to bind ranks; otherwise all are left as they are.
    """
    places = [row.gpus.place_of(row.rank) for row in rows]
    near = [
        parse_list(place.cpus) & frozenset(row.facts.allowed) if place is not None else frozenset[int]()
        for row, place in zip(rows, places, strict=True)
    ]
    sharing: dict[tuple[str, frozenset[int]], int] = {}
    for row, cpus in zip(rows, near, strict=True):
        sharing[row.host, cpus] = sharing.get((row.host, cpus), 0) + 1
    return tuple(
        _decide(row, place, cpus, sharing[row.host, cpus], bind)
        for row, place, cpus in zip(rows, places, near, strict=True)
    )


def _decide(row: RankFacts, place: GpuPlace | None, near: frozenset[int], ranks: int, bind: bool) -> RankBinding:
    if not bind:
        return RankBinding(LEFT, format_list(row.facts.cpus))
    kind = _kind(row, place, near, ranks)
    cpus = format_list(near if kind == BOUND else row.facts.cpus)
    return RankBinding(kind, cpus) if place is None else RankBinding(kind, cpus, place.node, place.host_nodes)


def _kind(row: RankFacts, place: GpuPlace | None, near: frozenset[int], ranks: int) -> str:
    mine, allowed = frozenset(row.facts.cpus), frozenset(row.facts.allowed)
    said = row.facts.variable(ENGINE_VARIABLE)
    if place is None or not place.cpus or not mine or not allowed:
        return UNKNOWN
    if mine != allowed:
        # with 1, the engine will bind it to the right ones
        return FITS if mine <= parse_list(place.cpus) else LEFT if said == "1" else WRONG
    if near == allowed:
        return SAME
    if said not in (None, "1"):
        return LEFT
    return FEW if len(near) < ranks else BOUND


def check_binding(rows: Sequence[RankFacts], bindings: Sequence[RankBinding]) -> Iterator[Finding]:
    """V17: each rank runs on the CPUs next to its GPU; on others, decoding was measured to take five times as long."""
    wrong, few = (
        [row for row, binding in zip(rows, bindings, strict=True) if binding.kind == kind] for kind in (WRONG, FEW)
    )
    if wrong:
        yield warning(
            "V17",
            f"ranks are bound to CPUs that aren't next to their GPU: {_where(wrong)}",
            found=lines([_describe(row, "bound to CPUs") for row in wrong]),
            expected="for each rank, CPUs of its GPU's NUMA node; the binding is left as it is, since launcher or user have made it",
            fix="srun --cpu-bind=none, mpirun --bind-to none: then each rank is bound to its GPU's CPUs",
        )
    if few:
        yield warning(
            "V17",
            f"the job has too few CPUs next to the ranks' GPUs: {_where(few)}",
            found=lines([_describe(row, "the job's CPUs are") for row in few]),
            expected="a CPU for each rank on its GPU's NUMA node; these ranks aren't bound, and run on any CPU of the job",
            fix="ask for the whole node (srun --exclusive), or for CPUs of all its sockets (--cpus-per-gpu=N); where that is meant, "
            "--cpu-bind none",
        )


def _where(some: Sequence[RankFacts]) -> str:
    return where(some, {row.rank: row for row in some})


def _describe(row: RankFacts, found: str) -> str:
    place = row.gpus.place_of(row.rank) or GpuPlace("")
    gpu = next((one.number for one in row.gpus.gpus if one.place == place), None)
    name = "its GPU" if gpu is None else f"GPU {gpu} ({place.address})"
    return (
        f"rank {row.rank} on {row.host}: {name} is next to CPUs {place.cpus} (node {place.node}), {found} "
        f"{format_list(row.facts.cpus)}"
    )


def describe(bindings: Sequence[RankBinding]) -> str:
    """Return a line for the log, before anything is bound; empty if nothing will be, and nothing was."""
    parts = []
    for (kind, cpus, node, host_nodes), ranks in _groups(bindings).items():
        words = [f"bound by the launcher to CPUs {cpus}"] if kind in (FITS, WRONG) else []
        memory = f"memory nodes {host_nodes}" if host_nodes else f"memory node {node}"
        if kind == BOUND:
            words.append(f"will be bound to CPUs {cpus}, {memory}")
        elif host_nodes:
            words.append(f"will be bound to {memory}")
        if words:
            parts.append(f"{_ranks(ranks)} {', '.join(words)}")
    return f"binding: {'; '.join(parts)}" if parts else ""


def as_record(bindings: Sequence[RankBinding]) -> dict[str, dict[str, object]]:
    """Return the bindings for the worker record, by ranks (``0-3, 8-11``); without those of which nothing is known."""
    return {
        spans(ranks): {"kind": binding.kind, "cpus": binding.cpus, "node": binding.node}
        for binding, ranks in _groups(bindings).items()
        if binding.kind != UNKNOWN
    }


def pack(bindings: Sequence[RankBinding]) -> str:
    """Write what the ranks must do, for `bind_rank`; empty if nothing. Only those to bind get CPUs."""
    return ";".join(
        "|".join((format_list(ranks), kind, cpus if kind == BOUND else "", str(node), host_nodes))
        for (kind, cpus, node, host_nodes), ranks in _groups(bindings).items()
        if kind in (BOUND, FITS) or host_nodes
    )


def _groups(bindings: Sequence[RankBinding]) -> dict[RankBinding, list[int]]:
    found: dict[RankBinding, list[int]] = {}
    for rank, binding in enumerate(bindings):
        found.setdefault(binding, []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {spans(ranks)}"
