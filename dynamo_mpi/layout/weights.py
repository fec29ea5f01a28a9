# SPDX-License-Identifier: Apache-2.0
"""Counts the weights of a model on each rank, from its shape alone (section J).

`layer_weights` counts one layer; this module adds up the layers of each pipeline stage.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.layout.layer_weights import Elements, Split, dtype_bytes, end_elements, layer_bytes, layer_elements
from dynamo_mpi.layout.model_shape import Feed, Layer, Mixer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.layout.model_shape import ModelShape
    from dynamo_mpi.layout.spec import LayoutSpec


@dataclass(frozen=True)
class StageWeights:
    """The weights of each rank of one pipeline stage.

    Args:
        stage: its number.
        layers: transformer layers that it holds, without those for multi-token prediction.
        first_layer: number of the first of them.
        elements: elements of one rank.
        bytes: bytes of one rank.
    """

    stage: int
    layers: int
    first_layer: int
    elements: Elements
    bytes: int


def split_of(subject: LayoutSpec) -> Split:
    """Return how a layout divides weights (C1, C2, E9, F10)."""
    layout, moe = subject.layout, subject.config.moe
    return Split(
        attention=layout.attention_tp_size,
        output=layout.head_split if layout.is_helix else layout.attention_tp_size,
        dense=layout.dense_tp_size,
        node=subject.config.gpus_per_node or subject.cluster.gpus_per_node,
        vocabulary=1 if layout.enable_attention_dp else layout.dense_tp_size,
        experts=layout.moe_ep_size,
        expert_slices=max(1, layout.moe_tp_size),
        slots=moe.num_slots if moe.balanced else None,
        whole_mlps=layout.enable_attention_dp,
    )


def missing_sizes(shape: ModelShape) -> tuple[str, ...]:
    """Name the values that a config lacks for its weights to be counted; empty if none is missing."""
    missing = [name for name in ("hidden_size", "vocab_size") if getattr(shape, name) is None]
    if shape.encoder_decoder:
        missing.append("the encoder's layers")
    if shape.layers is None:
        return (*missing, "num_hidden_layers" if shape.num_layers is None else "the kinds of its layers")
    kinds, _ = shape.kinds
    if any(kind.mixer is Mixer.ATTENTION for kind in kinds):
        missing += _missing_of_attention(shape)
    if any(kind.mixer in (Mixer.MAMBA2, Mixer.GATED_DELTA) for kind in kinds):
        state = shape.state_space
        known = state is not None and None not in (state.head_dim, state.state_size, state.kernel)
        missing += [] if known else ["the sizes of its state space"]
    if any(kind.feed is Feed.DENSE for kind in kinds) and shape.intermediate_size is None:
        missing.append("intermediate_size")
    if any(kind.feed is Feed.EXPERTS for kind in kinds):
        known = shape.experts is not None and shape.experts.intermediate_size is not None
        missing += [] if known else ["moe_intermediate_size"]
    quantisation = shape.quantisation
    if quantisation is not None and quantisation.algo != "NONE" and not quantisation.known:
        missing.append(f"the size of weights in {quantisation.algo}")
    return tuple(missing)


def _missing_of_attention(shape: ModelShape) -> Iterator[str]:
    if shape.attention_heads is None:
        yield "num_attention_heads"
    if shape.latent is not None:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(shape.latent, name) is None:
                yield name
    elif shape.output_groups is not None:
        yield "the sizes of compressed attention"  # DeepSeek-V4: the sizes of its kernels aren't public
    else:
        yield from (
            name for name, size in (("num_key_value_heads", shape.kv_heads), ("head_dim", shape.head_dim)) if not size
        )


def stage_weights(subject: LayoutSpec) -> tuple[StageWeights, ...] | None:
    """Count the weights of each pipeline stage's ranks; all ranks of a stage have the same amount.

    Returns:
        The stages in order; None if the config lacks sizes (`missing_sizes`).
    """
    shape = subject.shape
    if missing_sizes(shape) or shape.layers is None:
        return None
    split, layout = split_of(subject), subject.layout
    kinds, order = shape.kinds
    of_kind = [layer_elements(shape, kind, split) for kind in kinds]
    bytes_of_kind = [layer_bytes(shape, kind, part) for kind, part in zip(kinds, of_kind, strict=True)]
    extra = mtp_layer(subject)

    @cache  # most stages of a long pipeline are equal
    def held(layers: tuple[int, ...], first: bool, last: bool) -> tuple[Elements, int]:
        counts = Counter(layers)
        parts = [(of_kind[kind], count) for kind, count in counts.items()]
        total = sum(bytes_of_kind[kind] * count for kind, count in counts.items())
        if last and extra is not None:
            part = layer_elements(shape, extra[0], split)
            joined = 2 * (shape.hidden_size or 0) ** 2  # eh_proj: embedding and hidden state, side by side
            parts += [(part, extra[1]), (Elements(mixer=joined), extra[1])]
            total += (layer_bytes(shape, extra[0], part) + joined * dtype_bytes(shape)) * extra[1]
        ends = end_elements(shape, split, first=first, last=last)
        return _sum([*parts, (ends, 1)]), round(total + ends.total * dtype_bytes(shape))

    stages, start = [], 0
    for stage, size in enumerate(layout.stage_sizes(len(order), subject.config.pp_partition)):
        elements, weight = held(order[start : start + size], stage == 0, stage == layout.pp_size - 1)
        stages.append(StageWeights(stage, size, start, elements, weight))
        start += size
    return tuple(stages)


def total_parameters(shape: ModelShape) -> int | None:
    """Count a model's parameters, without layers for multi-token prediction; None if the config lacks sizes."""
    if missing_sizes(shape) or shape.layers is None:
        return None
    kinds, order = shape.kinds
    whole = Split()
    counts = Counter(order)
    layers = sum(layer_elements(shape, kinds[kind], whole).total * count for kind, count in counts.items())
    return layers + end_elements(shape, whole, first=True, last=True).total


def mtp_layer(subject: LayoutSpec) -> tuple[Layer, int] | None:
    """F6: the layer for multi-token prediction and how often the last stage has it; None without such speculation."""
    shape, speculative = subject.shape, subject.config.speculative
    if speculative is None or (speculative.decoding_type or "").upper() != "MTP" or not shape.nextn_layers:
        return None
    wanted = speculative.nextn_layers or speculative.max_draft_len or shape.nextn_layers
    layers = shape.layers or ()
    attention = next((layer for layer in reversed(layers) if layer.mixer is Mixer.ATTENTION), Layer())
    feed = next((layer for layer in reversed(layers) if layer.feed is not Feed.NONE), Layer())
    layer = Layer(
        Mixer.ATTENTION, feed.feed, None, attention.mixer_quantised, feed.feed_quantised, feed.shared_quantised
    )
    return layer, min(max(1, wanted), shape.nextn_layers)


def _sum(parts: Iterable[tuple[Elements, int]]) -> Elements:
    found = list(parts)
    return Elements(*(sum(getattr(part, name) * count for part, count in found) for name in _PARTS))


_PARTS = Elements.__match_args__
