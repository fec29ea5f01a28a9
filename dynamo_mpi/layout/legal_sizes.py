# SPDX-License-Identifier: Apache-2.0
"""The legal values of each size of a layout, by all rules about layouts, with the other sizes unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.layout.divisibility import MOST_CONTEXT_RANKS, divisors, legal_tp_sizes
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.layout import HELIX, Cluster
from dynamo_mpi.layout.rules.registry import layout_findings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_mpi.layout.spec import LayoutSpec

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
