# SPDX-License-Identifier: Apache-2.0
"""Reads the sizes of a model's parts that not every model has: latent and compressed attention, an indexer, experts, a state space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.model_shape import CompressedAttention, Experts, LatentAttention, StateSpace

if TYPE_CHECKING:
    from dynamo_mpi.common.config_reader import ConfigReader

MAX_HEADS = 65_536
_MAX_EXPERTS = 65_536


def read_latent(body: ConfigReader) -> LatentAttention | None:
    """Return the sizes of latent attention (MLA); None if the model has none."""
    rank = body.size("kv_lora_rank")
    if rank is None:
        return None
    return LatentAttention(
        rank,
        body.size("q_lora_rank"),
        body.size("qk_nope_head_dim", minimum=0),
        body.size("qk_rope_head_dim", minimum=0),
        body.size("v_head_dim"),
    )


def read_compressed(body: ConfigReader) -> CompressedAttention | None:
    """Return the sizes of DeepSeek-V4's attention; None for other models."""
    groups = body.size("o_groups", maximum=MAX_HEADS)
    if groups is None:
        return None
    return CompressedAttention(body.size("q_lora_rank"), body.size("o_lora_rank"), groups)


def read_indexer(body: ConfigReader) -> tuple[int | None, int | None]:
    """Return heads and head size of the sparse-attention indexer."""
    if isinstance(body.values.get("sparse_attention_config"), dict):  # MiniMax-M3
        section = body.section("sparse_attention_config")
        if section.values.get("use_sparse_attention") is False:
            return None, None
        return section.size("sparse_num_index_heads", maximum=MAX_HEADS), section.size("sparse_index_dim")
    if body.has("index_topk") or body.has("index_topk_blocks"):
        return body.size("index_n_heads", maximum=MAX_HEADS), body.size("index_head_dim")
    return None, None


def read_experts(body: ConfigReader) -> Experts | None:
    """Return the sizes of the experts, under the names of every family; None for a dense model."""
    count = body.size(
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), minimum=0, maximum=_MAX_EXPERTS
    )
    inner = body
    if count is None and isinstance(body.values.get("ffn_config"), dict):  # DBRX
        inner = body.section("ffn_config")
        count = inner.size("moe_num_experts", minimum=0, maximum=_MAX_EXPERTS)
    if not count:
        return None
    per_token = inner.size(
        *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "experts_per_token"),
        *("moe_top_k", "moe_topk", "moe_k", "num_selected_experts"),
        minimum=0,
    )
    width = inner.size(
        *("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
        *("intermediate_size", "ffn_hidden_size"),
    )
    latent = inner.size("moe_latent_size", "routed_expert_hidden_size")
    return Experts(count, per_token, width, _shared_size(body, width), latent)


def _shared_size(body: ConfigReader, expert_width: int | None) -> int:
    found = body.size(
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
        "share_expert_dim",
        minimum=0,
    )
    shared = body.size(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", minimum=0, maximum=_MAX_EXPERTS
    )
    if found is not None:
        return found
    if (body.text("model_type") or "").startswith("llama4"):
        return expert_width or 0  # one beside the routed ones, with the same width
    return (shared or 0) * (expert_width or 0)


def read_state_space(body: ConfigReader) -> StateSpace | None:
    """Return the sizes of layers that keep a state; None for a model without such."""
    dtype = body.text("mamba_ssm_cache_dtype") or body.text("mamba_ssm_dtype")
    heads = body.size("linear_num_value_heads", maximum=MAX_HEADS)
    if heads is not None:
        groups = body.size("linear_num_key_heads", maximum=MAX_HEADS)
        return StateSpace(
            heads,
            groups or heads,
            body.size("linear_value_head_dim"),
            body.size("linear_key_head_dim"),
            body.size("linear_conv_kernel_dim"),
            dtype=dtype,
        )
    if isinstance(body.values.get("linear_attn_config"), dict):  # Kimi-Linear
        section = body.section("linear_attn_config")
        heads = section.size("num_heads", maximum=MAX_HEADS)
        if heads is None:
            return None
        size, kernel = section.size("head_dim"), section.size("short_conv_kernel_size")
        full_rank = section.values.get("use_full_rank_gate") is True
        return StateSpace(heads, heads, size, size, kernel, full_rank, dtype)
    kernel = body.size("conv_L_cache")
    if kernel is not None:  # LFM2
        return StateSpace(1, 1, None, None, kernel, dtype=dtype)
    heads = body.size("mamba_num_heads", "mamba_n_heads", maximum=MAX_HEADS)
    if heads is None:
        return None
    return StateSpace(
        heads,
        body.size("n_groups", "mamba_n_groups", "mamba_num_groups", maximum=MAX_HEADS) or 1,
        body.size("mamba_head_dim", "mamba_d_head"),
        body.size("ssm_state_size", "mamba_d_state"),
        body.size("conv_kernel", "mamba_d_conv"),
        dtype=dtype,
    )
