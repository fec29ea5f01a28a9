# SPDX-License-Identifier: Apache-2.0
"""How heads, MLPs and experts are divided over ranks, and the sizes that a model allows (B11): for the rules, suggestions, the planner, and
the reference engine."""

from __future__ import annotations

from math import gcd

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.quantisation import FP8_BLOCK, FP8_BLOCK_SCALES, NVFP4, NVFP4_BLOCK

if TYPE_CHECKING:
    from dynamo_mpi.layout.model_shape import ModelShape
    from dynamo_mpi.layout.quantisation import WeightFormat

# DeepSeek-V3 and its relatives split a dense MLP by a common divisor instead of by tp (E9)
_GCD_FAMILIES = ("deepseek", "kimi", "glm4moe", "glmmoe", "exaonemoe")
MOST_CONTEXT_RANKS = 16
"""Larger context-parallel sizes aren't proposed."""


def kv_heads_fit(kv_heads: int, tp_size: int) -> bool:
    """B3: KV heads divide over the ranks, or each is held by a whole number of them (TensorRT-LLM, ``modeling_utils.py:
    duplicate_kv_weight``)."""
    return kv_heads % tp_size == 0 if kv_heads >= tp_size else tp_size % kv_heads == 0


def kv_copies(kv_heads: int, tp_size: int) -> int:
    """B4: the ranks that hold the same KV head."""
    return 1 if kv_heads >= tp_size else tp_size // kv_heads


def head_divisors(heads: int, kv_heads: int | None, cp_size: int = 1) -> tuple[int, ...]:
    """B11: the tensor-parallel sizes by which heads and KV heads can be divided, ascending, without attention DP.

    Llama-4 (40 heads, 8 KV heads): 1, 2, 4, 8, 40.

    Args:
        heads: attention heads of the whole model.
        kv_heads: its key/value heads; None if it has none (latent attention).
        cp_size: context-parallel size, which shares the attention heads out too.
    """
    return tuple(
        tp
        for tp in range(1, heads + 1)
        if heads % (tp * cp_size) == 0 and (kv_heads is None or kv_heads_fit(kv_heads, tp))
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def splits_dense_by_gcd(shape: ModelShape) -> bool:
    """E9: return whether this is one of the families whose dense and shared MLPs are split by a common divisor."""
    names = (shape.name.lower(), shape.model_type.replace("_", "").lower())
    return any(name.startswith(_GCD_FAMILIES) for name in names)


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


def dense_block(form: WeightFormat | None) -> int:
    """E9: return the block size of an MLP in those families: 128 for FP8 block scales, 16 for NVFP4, else 1."""
    return {FP8_BLOCK_SCALES: FP8_BLOCK, NVFP4: NVFP4_BLOCK}.get("" if form is None else form.algo, 1)


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
        for tp in head_divisors(shape.attention_heads, None, cp_size)
        if all(count % (tp * cp_size) == 0 for count in shape.head_counts)
        and all(count % tp == 0 for count in fixed)
        and all(kv_heads_fit(count, tp) for count in shape.kv_head_counts)
        and not (shape.encoder_decoder and (shape.kv_heads or tp) % tp)
    )


def workable_tp_sizes(shape: ModelShape, cp_size: int = 1) -> tuple[int, ...]:
    """Return the legal tensor-parallel sizes by which every MLP is divisible too (E1), ascending.

    Llama-4: 1, 2, 4, 8; its MLPs can't be divided by 40.
    """
    sizes = legal_tp_sizes(shape, cp_size) or ()
    if splits_dense_by_gcd(shape):
        return sizes
    widths = [*shape.dense_widths, shape.experts.shared_intermediate_size if shape.experts is not None else 0]
    return tuple(tp for tp in sizes if all(width % (tp * cp_size) == 0 for width in widths))


def legal_ep_sizes(shape: ModelShape) -> tuple[int, ...]:
    """D1: return the expert-parallel sizes that the experts allow without a load balancer, ascending; empty for a dense model."""
    return tuple(divisors(shape.experts.count)) if shape.experts is not None else ()
