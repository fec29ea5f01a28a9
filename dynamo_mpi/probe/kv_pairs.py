# SPDX-License-Identifier: Apache-2.0
"""Which decode rank pulls from which prefill ranks: those that hold the layers and KV heads that it needs. Pure.

As the engines divide a model: layers over pipeline stages, KV heads over the tensor-parallel ranks; where there are fewer heads than ranks,
several hold the same one, and under attention DP or with latent attention all ranks of a stage hold everything. Any of those may be asked
then; ranks that can choose are paired in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.engines.reference.kv_descriptor import KvShard, slices_of
from dynamo_mpi.parallelism.layout import Layout
from dynamo_mpi.parallelism.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from dynamo_mpi.parallelism.contract import Contract

_CP_FASTEST_SINCE = (1, 3)


class Pair(NamedTuple):
    """Two ranks, of two worlds.

    Args:
        decode: the rank that pulls.
        prefill: the rank that it pulls from.
    """

    decode: int
    prefill: int


def pairs_of(prefill: Contract, decode: Contract) -> tuple[Pair, ...]:
    """Return who pulls from whom, each pair once, by decode rank.

    Raises:
        ValueError: a part of what decode needs is held by nobody.
    """
    holders = holdings_of(prefill)
    found: dict[Pair, None] = {}
    for rank, need in enumerate(holdings_of(decode)):
        pieces = slices_of(need, holders, rank)
        # whoever has several to ask begins with another one than its neighbour does
        turn = rank % len(pieces)
        found.update(dict.fromkeys(Pair(rank, piece.rank) for piece in (*pieces[turn:], *pieces[:turn])))
    return tuple(found)


def holdings_of(contract: Contract) -> list[KvShard]:
    """Return what each rank of a world holds; layers are divided evenly, as engines do unless told otherwise."""
    version = contract.trtllm_version
    layout = Layout(
        contract.tp_size,
        contract.pp_size,
        contract.cp_size,
        enable_attention_dp=contract.enable_attention_dp,
        cp_fastest=version is None or parse_trtllm_version(version).release >= _CP_FASTEST_SINCE,
    )
    sizes = layout.stage_sizes(contract.num_layers or contract.pp_size)
    heads = 1 if contract.latent_attention else contract.kv_heads or 1
    return [_holding(layout, rank, sizes, heads) for rank in range(layout.world_size)]


def _holding(layout: Layout, rank: int, sizes: list[int], heads: int) -> KvShard:
    place = layout.place(rank, 1)
    first = sum(sizes[: place.pp_rank])
    layers = range(first, first + sizes[place.pp_rank])
    split = layout.attention_tp_size
    if split == 1:
        return KvShard(layers, range(heads))
    start = place.tp_rank * heads // split
    return KvShard(layers, range(start, max(start + 1, (place.tp_rank + 1) * heads // split)))
