# SPDX-License-Identifier: Apache-2.0
"""What layers have of their own in attention: how far they look back, and heads and head sizes that aren't the model's."""

from __future__ import annotations

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.model_shape import AttentionSizes

if TYPE_CHECKING:
    from dynamo_mpi.common.config_reader import ConfigReader

_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
# transformers' Llama4TextConfig: every fourth layer without rotary embedding sees everything
_LLAMA_4_GLOBAL_EVERY = 4


def layer_names(body: ConfigReader, key: str, num_layers: int) -> list[str] | None:
    """Read a list with a name for each layer."""
    names = body.values.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != num_layers or not all(isinstance(name, str) for name in names):
        raise body.bad(key, f"a list of {num_layers} names, as num_hidden_layers says")
    return names


def layer_flags(body: ConfigReader, key: str, num_layers: int) -> list[bool]:
    """Read a list with a number or a switch for each layer."""
    flags = body.values.get(key)
    if not isinstance(flags, list) or len(flags) != num_layers or not all(isinstance(flag, int) for flag in flags):
        raise body.bad(key, f"a list of {num_layers} numbers, as num_hidden_layers says")
    return [bool(flag) for flag in flags]


def attention_sizes(body: ConfigReader, num_layers: int) -> list[AttentionSizes]:
    """What layers have of their own: heads under a window or without one, compression, and an indexer."""
    types = layer_names(body, "layer_types", num_layers) or [""] * num_layers
    windowed = [window is not None for window in attention_windows(body, num_layers)]
    inside = _sizes_under_window(body)
    outside = AttentionSizes(
        kv_heads=body.size("num_global_key_value_heads", maximum=65_536),
        head_dim=body.size("global_head_dim"),
        keys_are_values=body.values.get("attention_k_eq_v") is True,
    )
    sizes = [inside if limited else outside for limited in windowed]
    shared = body.size("num_kv_shared_layers", minimum=0) or 0
    if shared:
        sizes = [replace(own, shares_kv=True) if i >= num_layers - shared else own for i, own in enumerate(sizes)]
    ratios = body.sizes("compress_ratios", minimum=0) or tuple(_COMPRESSED.get(kind, 0) for kind in types)
    if any(ratios):
        if len(ratios) < num_layers:
            raise body.bad("compress_ratios", f"a list of at least {num_layers} numbers, as num_hidden_layers says")
        sizes = [replace(own, compress_ratio=ratio) for own, ratio in zip(sizes, ratios, strict=False)]
    kinds = layer_names(body, "indexer_types", num_layers)
    if kinds is not None:
        sizes = [replace(own, indexed=kind != "shared") for own, kind in zip(sizes, kinds, strict=True)]
    section = body.values.get("sparse_attention_config")
    if isinstance(section, dict) and "sparse_attention_freq" in section:
        flags = layer_flags(body.section("sparse_attention_config"), "sparse_attention_freq", num_layers)
        sizes = [replace(own, indexed=flag) for own, flag in zip(sizes, flags, strict=True)]
    return sizes


def _sizes_under_window(body: ConfigReader) -> AttentionSizes:
    kv_heads = body.size("swa_num_key_value_heads", maximum=65_536)
    heads = body.size("swa_num_attention_heads", "num_sliding_attention_heads", maximum=65_536)
    if isinstance(body.values.get("attention_other_setting"), dict):  # Step-3.5
        other = body.section("attention_other_setting")
        heads = other.size("num_attention_heads", maximum=65_536) or heads
        kv_heads = other.size("num_attention_groups", maximum=65_536) or kv_heads
        return AttentionSizes(heads, kv_heads, other.size("head_dim"))
    size, value = body.size("swa_head_dim"), body.size("swa_v_head_dim")
    own = body.size("head_dim"), body.size("v_head_dim")
    # None where they are the model's own, whose values may be shorter than its keys
    return AttentionSizes(
        heads, kv_heads, None if (size, value) == own else size, None if (size, value) == own else value
    )


def attention_windows(body: ConfigReader, num_layers: int) -> list[int | None]:
    types = layer_names(body, "layer_types", num_layers)
    chunk = body.size("attention_chunk_size")
    window = None if body.values.get("use_sliding_window") is False else body.size("sliding_window", minimum=0) or None
    if types is not None:
        sizes = {
            **dict.fromkeys(("sliding_attention", "attention", *_COMPRESSED), window),
            "chunked_attention": chunk or window,
        }
        return [sizes.get(kind) for kind in types]
    if body.has("hybrid_layer_pattern"):  # MiMo: 1 for a windowed layer
        return [window if flag else None for flag in layer_flags(body, "hybrid_layer_pattern", num_layers)]
    if chunk is not None and (body.text("model_type") or "").startswith("llama4"):
        rotary = body.sizes("no_rope_layers", minimum=0)
        if rotary is not None and len(rotary) == num_layers:
            return [chunk if flag else None for flag in rotary]
        every = body.size("no_rope_layer_interval") or _LLAMA_4_GLOBAL_EVERY
        return [chunk if (i + 1) % every else None for i in range(num_layers)]
    every_global = body.size("sliding_window_pattern", "global_attn_every_n_layers") if window else None
    if window and every_global is None and (body.text("model_type") or "").startswith(("gemma3", "gemma2")):
        every_global = 6 if (body.text("model_type") or "").startswith("gemma3") else 2
    if every_global is not None:
        return [window if (i + 1) % every_global else None for i in range(num_layers)]
    if body.values.get("use_sliding_window") is True and body.has("max_window_layers"):
        full = body.size("max_window_layers", minimum=0) or 0
        return [window if i >= full else None for i in range(num_layers)]
    return [window] * num_layers
