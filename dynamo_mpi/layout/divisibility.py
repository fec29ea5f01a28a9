# SPDX-License-Identifier: Apache-2.0
"""B11: the sizes that a model allows, for suggestions and for the planner."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from dynamo_mpi.layout import heads
from dynamo_mpi.layout.quantisation import FP8_BLOCK, FP8_BLOCK_SCALES, NVFP4, NVFP4_BLOCK

if TYPE_CHECKING:
    from dynamo_mpi.layout.model_shape import ModelShape
    from dynamo_mpi.layout.quantisation import Quantisation


MOST_CONTEXT_RANKS = 16
"""Larger context-parallel sizes aren't proposed."""


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def common_split(width: int, block: int, ranks: int, gpus_per_node: int) -> int:
    """E9: return over how many ranks DeepSeek-V3 and its relatives divide an MLP: the common divisor of its scaling blocks and the ranks,
    within a node (``modeling_deepseekv3.py: _compute_mlp_tp_size``).

    Args:
        width: of the MLP.
        block: elements that share a scale (`dense_block`).
        ranks: number of ranks available for it.
        gpus_per_node: GPUs of a node.
    """
    split = gcd(width // block, ranks) or 1
    return gcd(split, gpus_per_node) if split > gpus_per_node else split


def dense_block(quantisation: Quantisation | None) -> int:
    """E9: return the block size of an MLP in those families: 128 for FP8 block scales, 16 for NVFP4, else 1."""
    return {FP8_BLOCK_SCALES: FP8_BLOCK, NVFP4: NVFP4_BLOCK}.get(
        quantisation.algo if quantisation is not None else "", 1
    )


def legal_tp_sizes(shape: ModelShape, cp_size: int = 1) -> tuple[int, ...] | None:
    """Return the tensor-parallel sizes that the rules about heads allow without attention DP, ascending; None where heads aren't known.

    Llama-4 (40 heads, 8 KV heads): 1, 2, 4, 8, 40.

    Args:
        shape: the model.
        cp_size: context-parallel size, which shares the attention heads out too.
    """
    if shape.attention_heads is None:
        return None
    state = shape.state_space
    fixed = [n for n in (shape.output_groups, *((state.heads, state.groups) if state else ())) if n is not None]
    return tuple(
        tp
        for tp in heads.legal_tp_sizes(shape.attention_heads, shape.kv_heads, cp_size)
        if all(count % tp == 0 for count in fixed) and not (shape.encoder_decoder and (shape.kv_heads or tp) % tp)
    )


def workable_tp_sizes(shape: ModelShape, cp_size: int = 1) -> tuple[int, ...]:
    """Return the legal tensor-parallel sizes by which every MLP is divisible too (E1), ascending.

    Llama-4: 1, 2, 4, 8; its MLPs can't be divided by 40.
    """
    sizes = legal_tp_sizes(shape, cp_size) or ()
    if shape.splits_dense_by_gcd:
        return sizes
    widths = [shape.intermediate_size, shape.experts.shared_intermediate_size if shape.experts is not None else 0]
    return tuple(tp for tp in sizes if all((width or 0) % (tp * cp_size) == 0 for width in widths))


def legal_ep_sizes(shape: ModelShape) -> tuple[int, ...]:
    """D1: return the expert-parallel sizes that the experts allow without a load balancer, ascending; empty for a dense model."""
    return tuple(divisors(shape.experts.count)) if shape.experts is not None else ()
