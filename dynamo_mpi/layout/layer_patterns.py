# SPDX-License-Identifier: Apache-2.0
"""Finds the kind of each layer of a model: every family has its own keys for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.config_reader import MAX_SIZE
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.layout.model_shape import AttentionSizes, Feed, Layer, Mixer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_mpi.common.config_reader import ConfigReader

_MIXERS = {
    **dict.fromkeys(("full_attention", "sliding_attention", "chunked_attention", "attention"), Mixer.ATTENTION),
    # with an indexer that picks tokens: the same weights and cache besides it
    **dict.fromkeys(("deepseek_sparse_attention", "indexed_attention", "minimax_m3_sparse"), Mixer.ATTENTION),
    **dict.fromkeys(("compressed_sparse_attention", "heavily_compressed_attention"), Mixer.ATTENTION),
    **dict.fromkeys(("mamba", "mamba2"), Mixer.MAMBA2),
    "conv": Mixer.CONVOLUTION,
}
_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
# layers of one part, by letter and by name (Nemotron-H)
_PARTS = {
    "M": (Mixer.MAMBA2, Feed.NONE),
    "*": (Mixer.ATTENTION, Feed.NONE),
    "-": (Mixer.NONE, Feed.DENSE),
    "E": (Mixer.NONE, Feed.EXPERTS),
    "mamba": (Mixer.MAMBA2, Feed.NONE),
    "attention": (Mixer.ATTENTION, Feed.NONE),
    "mlp": (Mixer.NONE, Feed.DENSE),
    "moe": (Mixer.NONE, Feed.EXPERTS),
    # as transformers 5 spells them
    "linear_attention": (Mixer.MAMBA2, Feed.NONE),
    "full_attention": (Mixer.ATTENTION, Feed.NONE),
}
_FEEDS = {"dense": Feed.DENSE, "sparse": Feed.EXPERTS, "moe": Feed.EXPERTS, "experts": Feed.EXPERTS}
_LLAMA_4_GLOBAL_EVERY = 4  # transformers' Llama4TextConfig: every fourth layer without rotary embedding sees everything
_MAX_LAYERS = 10_000


def count_layers(body: ConfigReader) -> int | None:
    """Return the number of layers: as the config has it, or that of a list with an entry for each."""
    count = body.size("num_hidden_layers", "n_layer", "n_layers", "num_layers", maximum=_MAX_LAYERS)
    if count is not None:
        return count
    for key in ("layers_block_type", "layer_types", "block_configs", "hybrid_override_pattern"):
        value = body.values.get(key)
        if isinstance(value, list | str) and 0 < len(value) <= _MAX_LAYERS:
            return len(value)
    return None


def read_layers(
    body: ConfigReader, num_layers: int, *, experts: bool, heads: int | None = None, hidden_size: int | None = None
) -> tuple[tuple[Layer, ...] | None, tuple[str, ...]]:
    """Return the kind of each layer, without number formats.

    Args:
        body: the language model's part of the config.
        num_layers: their number.
        experts: whether the config mentions experts.
        heads: attention heads of the model.
        hidden_size: width of the model.

    Returns:
        The layers, and nothing; or None, and the keys with kinds that aren't known here.

    Raises:
        ConfigFileError: a list of layers has another length than the model.
    """
    if body.has("block_configs"):
        return _blocks(body, num_layers, heads, hidden_size)
    parts = _layers_of_one_part(body, num_layers)
    if parts is None:
        mixers = _mixers(body, num_layers)
        feeds = _feeds(body, num_layers) if experts else [Feed.DENSE] * num_layers
        parts = list(zip(mixers, feeds, strict=True))
    sizes = _attention_sizes(body, num_layers)
    windows = _windows(body, num_layers)
    unknown = {part for pair in parts for part in pair if isinstance(part, str)}
    if unknown:
        return None, tuple(sorted(unknown))
    beside = experts and body.values.get("enable_moe_block") is True
    doubled = body.values.get("use_double_wide_mlp") is True
    wide = body.size("intermediate_size") if doubled else None
    layers = []
    for (mixer, feed), window, own in zip(parts, windows, sizes, strict=True):
        attention = mixer is Mixer.ATTENTION
        layers.append(
            Layer(
                mixer,
                feed,
                window if attention else None,
                sizes=own if attention else AttentionSizes(),
                width=2 * wide if wide and own.shares_kv else None,
                mlp_beside_experts=beside and feed is Feed.EXPERTS,
            )
        )
    return tuple(layers), ()


def _names(body: ConfigReader, key: str, num_layers: int) -> list[str] | None:
    """Read a list with a name for each layer."""
    names = body.values.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != num_layers or not all(isinstance(name, str) for name in names):
        raise body.bad(key, f"a list of {num_layers} names, as num_hidden_layers says")
    return names


def _flags(body: ConfigReader, key: str, num_layers: int) -> list[bool]:
    """Read a list with a number or a switch for each layer."""
    flags = body.values.get(key)
    if not isinstance(flags, list) or len(flags) != num_layers or not all(isinstance(flag, int) for flag in flags):
        raise body.bad(key, f"a list of {num_layers} numbers, as num_hidden_layers says")
    return [bool(flag) for flag in flags]


def _unknown(key: str, kind: str) -> str:
    return f"{key} ({kind[:40]!r})".encode("ascii", "backslashreplace").decode()


def _layers_of_one_part(body: ConfigReader, num_layers: int) -> list[tuple[Any, Any]] | None:
    """Nemotron-H: each layer is a mixer, an MLP or experts, by a letter or by a name. None for another kind of model."""
    key = "hybrid_override_pattern"
    kinds: Iterable[str] | None = body.text(key)
    if kinds is not None and len(str(kinds)) != num_layers:
        raise body.bad(key, f"{num_layers} letters, as num_hidden_layers says")
    if kinds is None:
        for key in ("layers_block_type", "layer_types"):
            kinds = _names(body, key, num_layers)
            if kinds is not None and not {"moe", "mlp"}.isdisjoint(kinds):
                break
        else:
            return None
    return [_PARTS.get(kind) or (_unknown(key, kind), Feed.NONE) for kind in kinds or ()]


def _mixers(body: ConfigReader, num_layers: int) -> list[Mixer | str]:
    """Return what mixes tokens in each layer; a text where that isn't known."""
    for key in ("layer_types", "layers_block_type"):
        kinds = _names(body, key, num_layers)
        if kinds is not None:
            linear = _linear(body)
            known = _MIXERS if linear is None else {**_MIXERS, "linear_attention": linear}
            return [known.get(kind) or _unknown(key, kind) for kind in kinds]
    if body.has("attn_type_list"):  # MiniMax: 1 for attention, 0 for linear attention of its own
        flags = _flags(body, "attn_type_list", num_layers)
        return [Mixer.ATTENTION if flag else "attn_type_list (0)" for flag in flags]
    if body.has("linear_attn_config"):
        return _kimi(body, num_layers)
    if body.has("linear_num_value_heads"):
        every = body.size("full_attention_interval") or _LLAMA_4_GLOBAL_EVERY
        return [Mixer.GATED_DELTA if (i + 1) % every else Mixer.ATTENTION for i in range(num_layers)]
    period = body.size("attn_layer_period")
    if period is None:
        # some layers have a state space or linear attention, but the config doesn't specify which
        keys = ("mamba_num_heads", "mamba_n_heads", "ssm_state_size", "mamba_d_state")
        vague: list[Mixer | str] = [key for key in keys if body.has(key)]
        return vague[:1] * num_layers or [Mixer.ATTENTION] * num_layers
    offset = body.size("attn_layer_offset", minimum=0) or 0
    return [Mixer.ATTENTION if i % period == offset else Mixer.MAMBA2 for i in range(num_layers)]


def _linear(body: ConfigReader) -> Mixer | None:
    """Return what ``linear_attention`` means in this config."""
    if body.has("linear_num_value_heads"):
        return Mixer.GATED_DELTA
    if body.has("linear_attn_config") or body.has("linear_num_heads"):
        return Mixer.KIMI_DELTA
    return Mixer.MAMBA2 if body.has("mamba_num_heads") or body.has("mamba_n_heads") else None


def _kimi(body: ConfigReader, num_layers: int) -> list[Mixer | str]:
    """Kimi-Linear counts layers from 1."""
    section = body.section("linear_attn_config")
    full = set(section.sizes("full_attn_layers") or ())
    delta = set(section.sizes("kda_layers") or ())
    missing = [number for number in range(1, num_layers + 1) if (number in full) == (number in delta)]
    if missing:
        raise section.bad("kda_layers", f"each of {num_layers} layers either there or in full_attn_layers")
    return [Mixer.ATTENTION if number in full else Mixer.KIMI_DELTA for number in range(1, num_layers + 1)]


def _feeds(body: ConfigReader, num_layers: int) -> list[Feed | str]:
    kinds = _names(body, "mlp_layer_types", num_layers)
    if kinds is not None:
        return [_FEEDS.get(kind) or _unknown("mlp_layer_types", kind) for kind in kinds]
    return [Feed.EXPERTS if flag else Feed.DENSE for flag in _expert_layers(body, num_layers)]


def _expert_layers(body: ConfigReader, num_layers: int) -> list[bool]:
    """Return which layers have experts: by a list, after some dense ones, every n-th, or all."""
    if isinstance(body.values.get("moe_layer_freq"), list):
        return _flags(body, "moe_layer_freq", num_layers)
    listed = _listed(body)
    if listed is not None:
        return [i in listed for i in range(num_layers)]
    if body.has("interleave_moe_layer_step"):  # Llama-4
        step = body.size("interleave_moe_layer_step", minimum=0) or 0
        return [step > 0 and (i + 1) % step == 0 for i in range(num_layers)]
    if body.has("decoder_sparse_step"):  # Qwen
        step = body.size("decoder_sparse_step", minimum=0) or 0
        dense = set(body.sizes("mlp_only_layers", minimum=0) or ())
        return [i not in dense and step > 0 and (i + 1) % step == 0 for i in range(num_layers)]
    if body.has("expert_layer_period"):  # Jamba
        period, offset = body.size("expert_layer_period") or 1, body.size("expert_layer_offset", minimum=0) or 0
        return [i % period == offset for i in range(num_layers)]
    if body.has("moe_layer_start_index"):  # Ernie 4.5
        start = body.size("moe_layer_start_index", minimum=0) or 0
        end = body.values.get("moe_layer_end_index")
        last = end if isinstance(end, int) and end >= 0 else num_layers - 1
        interval = body.size("moe_layer_interval") or 1
        return [start <= i <= last and (i + 1) % interval == 0 for i in range(num_layers)]
    # DeepSeek and GLM; LFM2; granite
    first = body.size("first_k_dense_replace", "num_dense_layers", minimum=0) or 0
    every = body.size("moe_layer_freq", minimum=1) or 1
    dense_layers = set(body.sizes("mlp_only_layers", minimum=0) or ())
    return [i >= first and i % every == 0 and i not in dense_layers for i in range(num_layers)]


def _listed(body: ConfigReader) -> set[int] | None:
    """The numbers of the layers with experts, as a list or as Step-3's text."""
    text = body.values.get("moe_layers_enum")
    if isinstance(text, str):
        numbers = [part.strip() for part in text.split(",") if part.strip()]
        if not all(part.isdecimal() and len(part) < 6 for part in numbers):
            raise body.bad("moe_layers_enum", "numbers of layers, with commas between")
        return set(map(int, numbers))
    listed = body.sizes("moe_layers", minimum=0)
    return None if listed is None else set(listed)


def _attention_sizes(body: ConfigReader, num_layers: int) -> list[AttentionSizes]:
    """What layers have of their own: heads under a window or without one, compression, and an indexer."""
    types = _names(body, "layer_types", num_layers) or [""] * num_layers
    windowed = [window is not None for window in _windows(body, num_layers)]
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
    kinds = _names(body, "indexer_types", num_layers)
    if kinds is not None:
        sizes = [replace(own, indexed=kind != "shared") for own, kind in zip(sizes, kinds, strict=True)]
    section = body.values.get("sparse_attention_config")
    if isinstance(section, dict) and "sparse_attention_freq" in section:
        flags = _flags(body.section("sparse_attention_config"), "sparse_attention_freq", num_layers)
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


def _windows(body: ConfigReader, num_layers: int) -> list[int | None]:
    types = _names(body, "layer_types", num_layers)
    chunk = body.size("attention_chunk_size")
    window = None if body.values.get("use_sliding_window") is False else body.size("sliding_window", minimum=0) or None
    if types is not None:
        sizes = {
            **dict.fromkeys(("sliding_attention", "attention", *_COMPRESSED), window),
            "chunked_attention": chunk or window,
        }
        return [sizes.get(kind) for kind in types]
    if body.has("hybrid_layer_pattern"):  # MiMo: 1 for a windowed layer
        return [window if flag else None for flag in _flags(body, "hybrid_layer_pattern", num_layers)]
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


def _blocks(
    body: ConfigReader, num_layers: int, heads: int | None, hidden_size: int | None
) -> tuple[tuple[Layer, ...] | None, tuple[str, ...]]:
    """Nemotron-NAS: each block has an attention and an MLP of its own size, a matrix in their place, or neither."""
    blocks = body.values.get("block_configs")
    if (
        not isinstance(blocks, list)
        or len(blocks) != num_layers
        or not all(isinstance(block, dict) for block in blocks)
    ):
        raise body.bad("block_configs", f"a list of {num_layers} mappings, as num_hidden_layers says")
    layers, missing = [], dict[str, None]()
    for block in blocks:
        attention, feed = block.get("attention") or {}, block.get("ffn") or {}
        if not isinstance(attention, dict) or not isinstance(feed, dict):
            raise body.bad("block_configs", "mappings with the mappings attention and ffn")
        mixer, window, kv_heads, width = Mixer.ATTENTION, None, None, None
        if attention.get("no_op") is True or attention.get("replace_with_linear") is True:
            mixer = Mixer.NONE if attention.get("no_op") is True else Mixer.LINEAR
        else:
            window = attention.get("window_length") if _is_size(attention.get("window_length")) else None
            kv_heads = _block_kv_heads(attention, heads)
            if kv_heads is None:
                missing["block_configs.attention.n_heads_in_group"] = None
        kind = Feed.DENSE
        if feed.get("no_op") is True or feed.get("replace_with_linear") is True:
            kind = Feed.NONE if feed.get("no_op") is True else Feed.LINEAR
        else:
            width = _block_width(feed, hidden_size)
            if width is None:
                missing["block_configs.ffn.ffn_mult"] = None
        if block.keys() - {"attention", "ffn"}:
            missing[f"block_configs.{min(map(str, block.keys() - {'attention', 'ffn'}))[:40]}"] = None
        layers.append(Layer(mixer, kind, window, sizes=AttentionSizes(kv_heads=kv_heads), width=width))
    return (None, tuple(missing)) if missing else (tuple(layers), ())


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def _block_kv_heads(attention: dict[str, Any], heads: int | None) -> int | None:
    own, group = attention.get("num_key_value_heads"), attention.get("n_heads_in_group")
    if _is_size(own):
        return own
    if heads is None or not isinstance(group, int) or not _is_size(group) or group > heads:
        return None
    return heads // group


def _block_width(feed: dict[str, Any], hidden_size: int | None) -> int | None:
    """DeciLM: two thirds of a multiple of the hidden size, rounded up to whole 256s (``_ffn_mult_to_intermediate_size``)."""
    own, multiple = feed.get("intermediate_size"), feed.get("ffn_mult")
    if _is_size(own):
        return own
    if hidden_size is None or isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return None
    if not 0 < multiple < 1000:
        return None
    return -(-int(2 * multiple * hidden_size / 3) // 256) * 256
