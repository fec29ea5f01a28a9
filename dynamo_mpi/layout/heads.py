# SPDX-License-Identifier: Apache-2.0
"""How attention heads are divided over tensor-parallel ranks: the rule that the checks and the reference engine share."""

from __future__ import annotations


def kv_heads_fit(kv_heads: int, tp_size: int) -> bool:
    """B3: KV heads divide over the ranks, or each is held by a whole number of them (TensorRT-LLM, ``modeling_utils.py:
    duplicate_kv_weight``)."""
    return kv_heads % tp_size == 0 if kv_heads >= tp_size else tp_size % kv_heads == 0


def kv_copies(kv_heads: int, tp_size: int) -> int:
    """B4: the ranks that hold the same KV head."""
    return 1 if kv_heads >= tp_size else tp_size // kv_heads


def legal_tp_sizes(heads: int, kv_heads: int | None, cp_size: int = 1) -> tuple[int, ...]:
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
