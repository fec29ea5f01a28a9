# SPDX-License-Identifier: Apache-2.0
"""What a user may have meant: layouts near one that can't be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo_mpi.parallelism.layout import HELIX, Cluster
from dynamo_mpi.parallelism.legal import divisors
from dynamo_mpi.parallelism.wording import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.parallelism.engine_config import EngineConfig
    from dynamo_mpi.parallelism.subject import Subject


def meant_by_more_experts_than_ranks(subject: Subject) -> list[Subject]:
    """Return the legal layouts that give a tp and an ep at once where ep is the larger: TP8/EP16 on 8 ranks.

    Each takes as many ranks as ep asks for, spread over nodes of the same size: as tp with attention DP, as pipeline stages of tp ranks, or,
    on a decode worker, as context ranks.
    """
    layout, cluster = subject.layout, subject.cluster
    if layout.moe_ep_size <= layout.moe_world_size or layout.moe_ep_size % layout.tp_size:
        return []
    found = []
    for config, role in _wider(subject.config, layout.tp_size, layout.moe_ep_size, subject.role):
        world = config.world_size
        per_node = min(cluster.gpus_per_node, world)
        if world % per_node:
            continue
        config = config if config.gpus_per_node is None else replace(config, gpus_per_node=per_node)
        other = replace(
            subject, config=config, role=role, cluster=replace(cluster, nodes=world // per_node, gpus_per_node=per_node)
        )
        if is_legal(other):
            found.append(other)
    return found


def _wider(config: EngineConfig, tp_size: int, ep_size: int, role: str) -> Iterator[tuple[EngineConfig, str]]:
    more = ep_size // tp_size
    free = replace(config, moe_tp_size=None, moe_cluster_size=None)
    if config.pp_size == 1 and config.cp_size == 1:
        yield replace(free, tp_size=ep_size, enable_attention_dp=True), role
        yield replace(free, pp_size=more, moe_ep_size=tp_size, pp_partition=None), role
        yield replace(free, cp_size=more, cp_type=HELIX, enable_attention_dp=False), "decode"
    yield replace(free, tp_size=ep_size), role


def is_legal(subject: Subject) -> bool:
    """Does no rule about the layout refuse it? Rules about keys, roles and memory aren't asked."""
    from dynamo_mpi.parallelism.finding import errors
    from dynamo_mpi.parallelism.rules.registry import layout_findings

    return not errors(layout_findings(subject))


def for_expert_parallelism(subject: Subject) -> str:
    """Say what to do about expert sizes that don't multiply out (A2)."""
    layout = subject.layout
    ranks = layout.moe_world_size
    experts = subject.shape.experts
    sizes = [ep for ep in divisors(ranks) if experts is None or experts.count % ep == 0]
    advice = f"set moe_expert_parallel_size to one of {listed(sizes)}, and leave moe_tensor_parallel_size out"
    wider = meant_by_more_experts_than_ranks(subject)
    if not wider:
        return advice
    return f"on {other_shapes(wider)}; on these {ranks} ranks {advice}"


def other_shapes(subjects: list[Subject]) -> str:
    """Name layouts with the ranks and the role they need: ``16 ranks: TP16/EP16 with attention DP, or TP8/EP8/PP2``."""
    by_world: dict[int, list[str]] = {}
    for subject in subjects:
        by_world.setdefault(subject.layout.world_size, []).append(short_name(subject))
    return "; on ".join(f"{world} ranks: {', or '.join(names)}" for world, names in by_world.items())


def short_name(subject: Subject) -> str:
    """Write a layout as its users do: ``TP8/EP8/PP2``, ``TP8 x CP2 helix/EP16 on a decode worker``."""
    layout = subject.layout
    text = f"TP{layout.tp_size}"
    if layout.cp_size > 1:
        text += f" x CP{layout.cp_size} {(layout.cp_type or '').lower()}".rstrip()
    if layout.moe_ep_size > 1:
        text += f"/EP{layout.moe_ep_size}"
    if layout.pp_size > 1:
        text += f"/PP{layout.pp_size}"
    if layout.enable_attention_dp:
        text += " with attention DP"
    return text + (" on a decode worker" if layout.is_helix else "")


def cluster_for(world_size: int, gpus_per_node: int, gpu: str | None = None) -> Cluster | None:
    """Return nodes for so many ranks: whole nodes, or a part of one; None where they would be unequal."""
    if world_size <= gpus_per_node:
        return Cluster(1, world_size, gpu)
    return Cluster(world_size // gpus_per_node, gpus_per_node, gpu) if world_size % gpus_per_node == 0 else None
