# SPDX-License-Identifier: Apache-2.0
"""Finds the kind of each layer of a model: every family has its own keys for that."""

from __future__ import annotations

from dynamo_mpi.common.config_reader import MAX_SIZE
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.attention_patterns import attention_sizes, attention_windows, layer_flags, layer_names
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
_MAX_LAYERS = 10_000
# transformers' Qwen3NextConfig: without full_attention_interval, every fourth layer has full attention
_QWEN_ATTENTION_EVERY = 4


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
    sizes = attention_sizes(body, num_layers)
    windows = attention_windows(body, num_layers)
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
            kinds = layer_names(body, key, num_layers)
            if kinds is not None and not {"moe", "mlp"}.isdisjoint(kinds):
                break
        else:
            return None
    return [_PARTS.get(kind) or (_unknown(key, kind), Feed.NONE) for kind in kinds or ()]


def _mixers(body: ConfigReader, num_layers: int) -> list[Mixer | str]:
    """Return what mixes tokens in each layer; a text where that isn't known."""
    for key in ("layer_types", "layers_block_type"):
        kinds = layer_names(body, key, num_layers)
        if kinds is not None:
            linear = _linear(body)
            known = _MIXERS if linear is None else {**_MIXERS, "linear_attention": linear}
            return [known.get(kind) or _unknown(key, kind) for kind in kinds]
    if body.has("attn_type_list"):  # MiniMax: 1 for attention, 0 for linear attention of its own
        flags = layer_flags(body, "attn_type_list", num_layers)
        return [Mixer.ATTENTION if flag else "attn_type_list (0)" for flag in flags]
    if body.has("linear_attn_config"):
        return _kimi(body, num_layers)
    if body.has("linear_num_value_heads"):
        every = body.size("full_attention_interval") or _QWEN_ATTENTION_EVERY
        return [Mixer.GATED_DELTA if (i + 1) % every else Mixer.ATTENTION for i in range(num_layers)]
    for key, other in (("attn_layer_indices", Mixer.MAMBA2), ("full_attn_idxs", Mixer.CONVOLUTION)):  # Bamba; LFM2
        numbers = body.sizes(key, minimum=0)
        if numbers is not None:
            return [Mixer.ATTENTION if i in numbers else other for i in range(num_layers)]
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
    kinds = layer_names(body, "mlp_layer_types", num_layers)
    if kinds is not None:
        return [_FEEDS.get(kind) or _unknown("mlp_layer_types", kind) for kind in kinds]
    return [Feed.EXPERTS if flag else Feed.DENSE for flag in _expert_layers(body, num_layers)]


def _expert_layers(body: ConfigReader, num_layers: int) -> list[bool]:
    """Return which layers have experts: by a list, after some dense ones, every n-th, or all."""
    if isinstance(body.values.get("moe_layer_freq"), list):
        return layer_flags(body, "moe_layer_freq", num_layers)
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
