# SPDX-License-Identifier: Apache-2.0
"""Reads the sizes of a model's parts that not every model has: latent and compressed attention, an indexer, experts, a state space, encoders.

An encoder's parameters are those of a plain transformer encoder and its projector, within a few per cent for the families that name their
sizes as below. One that lacks a size is not counted, and named.
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.model_shape import CompressedAttention, Encoder, Experts, LatentAttention, StateSpace

if TYPE_CHECKING:
    from dynamo_mpi.common.config_reader import ConfigReader

MAX_HEADS = 65_536
_MAX_EXPERTS = 65_536
_SECTIONS = ("vision_config", "audio_config", "vision_tower_config", "speech_config", "sound_config")
_WITHOUT_LANGUAGE = ("thinker_config",)  # Qwen-Omni keeps them inside
# encoders whose MLP has a gate
_GATED = ("qwen2_5_vl", "pixtral", "gemma4_vision", "step3", "llama4_vision_gated")


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


def read_encoders(config: ConfigReader) -> tuple[Encoder, ...]:
    """Read all encoders of a config.

    Raises:
        ConfigFileError: a size in one isn't a whole number.
    """
    holders = [config, *(config.section(key) for key in _WITHOUT_LANGUAGE if isinstance(config.values.get(key), dict))]
    return tuple(
        _encoder(holder.section(key), key)
        for holder in holders
        for key in _SECTIONS
        if isinstance(holder.values.get(key), dict) and holder.values[key]
    )


def _encoder(section: ConfigReader, key: str) -> Encoder:
    layers = section.size(
        "num_hidden_layers", "depth", "vt_num_hidden_layers", "encoder_layers", "layers", "num_layers"
    )
    hidden = section.size("hidden_size", "vt_hidden_size", "embed_dim", "width", "d_model")
    # Qwen2-VL: hidden_size is the language model's, embed_dim the encoder's
    if section.has("embed_dim") and section.has("depth") and section.has("mlp_ratio"):
        hidden = section.size("embed_dim")
    width = section.size("intermediate_size", "vt_intermediate_size", "encoder_ffn_dim")
    if width is None and hidden is not None and section.has("mlp_ratio"):
        ratio = section.number("mlp_ratio") or 0.0
        width = round(hidden * ratio) if 0 < ratio < 100 else None
    missing = tuple(
        f"{key}.{name}"
        for name, size in (("num_hidden_layers", layers), ("hidden_size", hidden), ("intermediate_size", width))
        if size is None
    )
    if layers is None or hidden is None or width is None:
        return Encoder(key, None, missing)
    kind = section.text("model_type") or ""
    matrices = 3 if kind.startswith(_GATED) or section.text("hidden_act") == "silu" else 2
    patch = section.size("patch_size") or 0
    embedding = 3 * patch * patch * (section.size("temporal_patch_size") or 1) * hidden
    out = section.size("out_hidden_size", "text_hidden_size", "output_dim", "projection_dim") or hidden
    merged = hidden * _merged(section)
    projector = merged * merged + merged * out
    return Encoder(key, layers * (4 * hidden * hidden + matrices * hidden * width) + embedding + projector)


def _merged(section: ConfigReader) -> int:
    """Return how many patches become one token."""
    kernel = section.sizes("merge_kernel_size") if isinstance(section.values.get("merge_kernel_size"), list) else None
    if kernel and len(kernel) == 2 and max(kernel) <= 16:
        return kernel[0] * kernel[1]
    side = section.size("spatial_merge_size", "spatial_patch_merge") or 1
    return side * side if side <= 16 else 1
