# SPDX-License-Identifier: Apache-2.0
"""Finds the kind of each layer of a model: every family has its own keys for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.model_shape import Feed, Layer, Mixer

if TYPE_CHECKING:
    from dynamo_mpi.common.config_reader import Reader
    from dynamo_mpi.layout.quantisation import Quantisation

_MIXERS = {
    "full_attention": Mixer.ATTENTION,
    "sliding_attention": Mixer.ATTENTION,
    "chunked_attention": Mixer.ATTENTION,
    "attention": Mixer.ATTENTION,
    "linear_attention": Mixer.GATED_DELTA,
    "mamba": Mixer.MAMBA2,
    "mamba2": Mixer.MAMBA2,
}
_NEMOTRON = {
    "M": (Mixer.MAMBA2, Feed.NONE),
    "*": (Mixer.ATTENTION, Feed.NONE),
    "-": (Mixer.NONE, Feed.DENSE),
    "E": (Mixer.NONE, Feed.EXPERTS),
}
_LLAMA_4_GLOBAL_EVERY = 4  # transformers' Llama4TextConfig: every fourth layer without rotary embedding sees everything


def read_layers(
    body: Reader, num_layers: int, *, experts: bool, quantisation: Quantisation | None
) -> tuple[Layer, ...] | None:
    """Return the kind of each layer.

    Args:
        body: the language model's part of the config.
        num_layers: their number.
        experts: whether the config mentions experts.
        quantisation: the checkpoint's quantisation.

    Returns:
        The layers; None if the config names unknown kinds.

    Raises:
        ConfigFileError: a list of layers has another length than the model.
    """
    nemotron = body.text("hybrid_override_pattern")
    if nemotron is not None:
        if len(nemotron) != num_layers:
            raise body.bad("hybrid_override_pattern", f"{num_layers} letters, as num_hidden_layers says")
        if set(nemotron) - set(_NEMOTRON):
            return None
        kinds = [_NEMOTRON[letter] for letter in nemotron]
    else:
        mixers = _mixers(body, num_layers)
        if mixers is None:
            return None
        feeds = _feeds(body, num_layers) if experts else [Feed.DENSE] * num_layers
        kinds = list(zip(mixers, feeds, strict=True))
    windows = _windows(body, num_layers)
    windowed_kv_heads = body.size("swa_num_key_value_heads")
    layers = []
    for index, ((mixer, feed), window) in enumerate(zip(kinds, windows, strict=True)):
        window = window if mixer is Mixer.ATTENTION else None
        kv_heads = None if window is None else windowed_kv_heads
        layers.append(Layer(mixer, feed, window, *_quantised(index, feed, quantisation), kv_heads))
    return tuple(layers)


def _types(body: Reader, num_layers: int) -> list[str] | None:
    types = body.values.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or not all(isinstance(kind, str) for kind in types):
        raise body.bad("layer_types", f"a list of {num_layers} names, as num_hidden_layers says")
    return types


def _mixers(body: Reader, num_layers: int) -> list[Mixer] | None:
    types = _types(body, num_layers)
    if types is not None:
        mixers = [_MIXERS.get(kind) for kind in types]
        return None if None in mixers else [mixer for mixer in mixers if mixer is not None]
    if body.has("linear_num_value_heads"):
        every = body.size("full_attention_interval") or _LLAMA_4_GLOBAL_EVERY
        return [Mixer.GATED_DELTA if (i + 1) % every else Mixer.ATTENTION for i in range(num_layers)]
    period = body.size("attn_layer_period")
    if period is None and (body.has("mamba_num_heads") or body.has("mamba_n_heads")):
        return None  # some layers have a state space, but the config doesn't specify which
    if period is not None:
        offset = body.size("attn_layer_offset", minimum=0) or 0
        return [Mixer.ATTENTION if i % period == offset else Mixer.MAMBA2 for i in range(num_layers)]
    return [Mixer.ATTENTION] * num_layers


def _feeds(body: Reader, num_layers: int) -> list[Feed]:
    flags = _expert_layers(body, num_layers)
    return [Feed.EXPERTS if flag else Feed.DENSE for flag in flags]


def _expert_layers(body: Reader, num_layers: int) -> list[bool]:
    """Return which layers have experts: by a list, after some dense ones, every n-th, or all."""
    frequency = body.values.get("moe_layer_freq")
    if isinstance(frequency, list):
        if len(frequency) != num_layers:
            raise body.bad("moe_layer_freq", f"a list of {num_layers} numbers, as num_hidden_layers says")
        return [bool(flag) for flag in frequency]
    listed = body.sizes("moe_layers", minimum=0)
    if listed is not None:
        return [i in set(listed) for i in range(num_layers)]
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
    first = body.size("first_k_dense_replace", minimum=0) or 0  # DeepSeek, GLM
    every = body.size("moe_layer_freq", minimum=1) or 1
    dense_layers = set(body.sizes("mlp_only_layers", minimum=0) or ())
    return [i >= first and i % every == 0 and i not in dense_layers for i in range(num_layers)]


def _windows(body: Reader, num_layers: int) -> list[int | None]:
    types = _types(body, num_layers)
    chunk = body.size("attention_chunk_size")
    window = None if body.values.get("use_sliding_window") is False else body.size("sliding_window", minimum=0) or None
    if types is not None:
        sizes = {"sliding_attention": window, "chunked_attention": chunk or window, "attention": window}
        return [sizes.get(kind) for kind in types]
    if body.has("hybrid_layer_pattern"):  # MiMo: 1 for a windowed layer
        pattern = body.sizes("hybrid_layer_pattern", minimum=0) or ()
        if len(pattern) != num_layers:
            raise body.bad("hybrid_layer_pattern", f"a list of {num_layers} numbers, as num_hidden_layers says")
        return [window if flag else None for flag in pattern]
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


_ATTENTIONS = ("self_attn.o_proj", "self_attn.out_proj", "attention.o_proj", "linear_attn.out_proj", "mixer.out_proj")
_DENSE = ("mlp.down_proj", "feed_forward.down_proj", "mixer.down_proj")
_ROUTED = (
    "mlp.experts.0.down_proj",
    "feed_forward.experts.down_proj",
    "block_sparse_moe.experts.0.w2",
    "mixer.experts.0.down_proj",
)
_SHARED = (
    "mlp.shared_experts.down_proj",
    "mlp.shared_expert.down_proj",
    "feed_forward.shared_expert.down_proj",
    "mixer.shared_experts.down_proj",
)


def _quantised(index: int, feed: Feed, quantisation: Quantisation | None) -> tuple[bool, bool, bool]:
    if quantisation is None:
        return False, False, False
    if not quantisation.excluded:
        return True, feed is not Feed.NONE, feed is Feed.EXPERTS

    def covered(names: tuple[str, ...]) -> bool:
        return not any(quantisation.excludes(f"layers.{index}.{name}") for name in names)

    return (
        covered(_ATTENTIONS),
        covered(_ROUTED if feed is Feed.EXPERTS else _DENSE) and feed is not Feed.NONE,
        feed is Feed.EXPERTS and covered(_SHARED),
    )
