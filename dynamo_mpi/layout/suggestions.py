# SPDX-License-Identifier: Apache-2.0
"""Suggests legal layouts in place of an illegal one: those that match the likely intention, the nearest ones, and
the legal values of each size with the others unchanged."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.layout.divisibility import MOST_CONTEXT_RANKS, divisors, legal_tp_sizes
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.layout import HELIX, Cluster, short_name
from dynamo_mpi.layout.memory import estimate
from dynamo_mpi.layout.rules.registry import all_findings, layout_findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.layout import LayoutSpec

_MANY = 1000
_MOST_NODES = 16


def meant_by_more_experts_than_ranks(subject: LayoutSpec) -> list[LayoutSpec]:
    """Return legal layouts with the given tp and ep if ep is larger: TP8/EP16 on 8 ranks.

    Each has as many ranks as ep needs, over nodes of the same size: as tp with attention DP, as pipeline stages of tp ranks, or,
    on a decode worker, as context ranks.
    """
    layout, cluster = subject.layout, subject.cluster
    no_experts = subject.shape.experts is None
    if no_experts or layout.moe_ep_size <= layout.moe_world_size or layout.moe_ep_size % layout.tp_size:
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
        if not errors(layout_findings(other)):
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


def other_shapes(subjects: list[LayoutSpec]) -> str:
    """Name layouts with the ranks and the role they need: ``16 ranks: TP16/EP16 with attention DP, or TP8/EP8/PP2``."""
    by_world: dict[int, list[str]] = {}
    for subject in subjects:
        by_world.setdefault(subject.layout.world_size, []).append(short_name(subject))
    return "; on ".join(f"{counted(world, 'rank')}: {', or '.join(names)}" for world, names in by_world.items())


def suggestions(subject: LayoutSpec, count: int = 3) -> list[LayoutSpec]:
    """Return layouts that pass every rule: those that match the likely intention, then the nearest on the same GPUs, or, if none fits on
    them, the best on more GPUs.

    Rules about keys and roles aren't applied: their findings are corrected in the config, independently of the layout.
    """
    if subject.other_backend:
        return []
    # imported here: the planner is needed only for errors
    from dynamo_mpi.layout.planner import nearest, plan

    found = [other for other in meant_by_more_experts_than_ranks(subject) if _fits(other) and _passes(other)]
    near = (made.subject for made in nearest(subject, _MANY) if made.fits is not False)
    seen = {(other.layout, other.role) for other in found}
    found += islice((other for other in near if (other.layout, other.role) not in seen and _passes(other)), count)
    nodes = subject.cluster.nodes
    while not found and nodes * 2 <= _MOST_NODES:
        nodes *= 2
        plans = plan(replace(subject, cluster=replace(subject.cluster, nodes=nodes)))
        found = list(islice((made.subject for made in plans if made.fits is not False and _passes(made.subject)), 1))
    return found


def _fits(subject: LayoutSpec) -> bool:
    memory = estimate(subject)
    return memory is None or memory.fits is not False


def _passes(subject: LayoutSpec) -> bool:
    return all(finding.rule.startswith(("H", "I")) for finding in errors(all_findings(subject)))


_MOST_RANKS = 1024


def legal_sizes(subject: LayoutSpec) -> dict[str, list[int]]:
    """Return the legal sizes, ascending.

    Returns:
        ``tp``, ``pp``, ``ep`` (with experts) and ``cp`` (on decode workers), on as many ranks as they need; and ``tp_by_heads``, what the
        heads alone allow without attention DP (B11). A list is missing where the model's config doesn't say enough.
    """
    if subject.other_backend:
        return {}
    shape, config, layout = subject.shape, subject.config, subject.layout
    by_heads = legal_tp_sizes(shape, layout.cp_size)
    legal: dict[str, list[int]] = {}
    if by_heads is not None:
        tried = divisors(_ranks(subject)) if layout.enable_attention_dp else by_heads
        legal["tp"] = _pass(subject, "tp_size", tried)
        legal["tp_by_heads"] = list(by_heads)
    if shape.num_layers is not None:
        legal["pp"] = _pass(
            replace(subject, config=replace(config, pp_partition=None)), "pp_size", divisors(_ranks(subject))
        )
    if shape.experts is not None:
        free = replace(subject, config=replace(config, moe_tp_size=None, moe_cluster_size=None))
        legal["ep"] = _pass(free, "moe_ep_size", divisors(min(layout.moe_world_size, _MOST_RANKS)))
    if shape.attention_heads is not None and subject.role == "decode":
        helix = replace(subject, config=replace(config, cp_type=HELIX))
        legal["cp"] = _pass(helix, "cp_size", range(1, MOST_CONTEXT_RANKS + 1))
    return legal


def _ranks(subject: LayoutSpec) -> int:
    return min(subject.cluster.world_size, _MOST_RANKS)


def _pass(subject: LayoutSpec, name: str, sizes: Iterable[int]) -> list[int]:
    return [
        size for size in sizes if size <= _MOST_RANKS and not errors(layout_findings(_resized(subject, {name: size})))
    ]


def _resized(subject: LayoutSpec, change: dict[str, Any]) -> LayoutSpec:
    config = replace(subject.config, gpus_per_node=None, **change)
    return replace(subject, config=config, cluster=Cluster(1, config.world_size, subject.cluster.gpu))
