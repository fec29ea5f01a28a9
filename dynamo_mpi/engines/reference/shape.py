# SPDX-License-Identifier: Apache-2.0
"""The sizes of a llama model, and each rank's shard of it. Pure.

Ranks are numbered as in TensorRT-LLM: tensor parallelism fastest, pipeline slowest (its ``MpiTopology``), so that with blocks of ranks per
node the tensor-parallel sums stay inside a node and only one row per token is sent between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_mpi.common.errors import LayoutError
from dynamo_mpi.layout.divisibility import head_divisors
from dynamo_mpi.layout.format import counted


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of one model, with the names of its Hugging Face configuration if they are in it."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True)
class Share:
    """One rank's shard. All ranges are contiguous and in global numbers.

    Args:
        query_heads: whole heads of the attention.
        kv_heads: the key/value heads of these; ranks share one if ``tp_size`` exceeds their number.
        intermediate: columns of the feed-forward layer.
        vocabulary: token ids.
    """

    query_heads: range
    kv_heads: range
    intermediate: range
    vocabulary: range


@dataclass(frozen=True)
class Stage:
    """The layers of one rank.

    Args:
        index: the stage's number, from 0.
        count: number of stages.
        layers: global numbers of the stage's layers.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def share_of(shape: LlamaShape, rank: int, tp_size: int) -> Share:
    """Return the shard of ``rank`` of ``tp_size``.

    Raises:
        LayoutError: the heads cannot be divided like this.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    legal = head_divisors(heads, kv_heads)
    if tp_size not in legal:
        raise LayoutError(
            f"tensor_parallel_size {tp_size} does not fit {heads} attention heads and {kv_heads} key/value heads",
            expected=f"tensor_parallel_size one of {', '.join(map(str, legal))}",
            fix="set tensor_parallel_size in the engine config and start as many ranks",
        )
    query_heads = part_of(heads, tp_size, rank)
    group = heads // kv_heads
    return Share(
        query_heads=query_heads,
        kv_heads=range(query_heads.start // group, (query_heads.stop - 1) // group + 1),
        intermediate=part_of(shape.intermediate_size, tp_size, rank),
        vocabulary=part_of(shape.vocab_size, tp_size, rank),
    )


def stage_of(layers: int, rank: int, tp_size: int, pp_size: int) -> Stage:
    """Return the stage of ``rank``; the first stages hold one layer more if the number isn't divisible (F1: ``mapping.py: pp_layers``).

    Raises:
        LayoutError: there are more stages than layers (F3).
    """
    if layers < pp_size:
        raise LayoutError(
            f"pipeline_parallel_size {pp_size} is more than the model's {counted(layers, 'layer')}",
            expected=f"pipeline_parallel_size of at most {layers}",
            fix="lower pipeline_parallel_size in the engine config and start fewer ranks",
        )
    index = rank // tp_size
    return Stage(index, pp_size, part_of(layers, pp_size, index))


def part_of(total: int, parts: int, index: int) -> range:
    """Return the ``index``-th of ``parts`` contiguous ranges of ``total`` items; the first ones hold the remainder."""
    quotient, remainder = divmod(total, parts)
    start = index * quotient + min(index, remainder)
    return range(start, start + quotient + (1 if index < remainder else 0))
