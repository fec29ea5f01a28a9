# SPDX-License-Identifier: Apache-2.0
"""Counts the weights of a model on each rank, from its shape alone (section J).

`layer_weights` counts one layer; this module adds up the layers of each pipeline stage.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.layer_weights import Elements, Part, Split, bytes_of, elements_of, end_parts, layer_parts
from dynamo_mpi.layout.model_shape import Feed, Mixer
from dynamo_mpi.layout.quantisation import MIXED_PRECISION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import Layer, ModelShape


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
        unknown = "num_hidden_layers" if shape.num_layers is None else "the kinds of its layers"
        return (*missing, *(shape.unknown_layers or (unknown,)))
    kinds, _ = shape.kinds
    if any(kind.mixer is Mixer.ATTENTION for kind in kinds):
        missing += _missing_of_attention(shape, kinds)
    if any(kind.mixer.keeps_state for kind in kinds):
        missing += _missing_of_states(shape, kinds)
    dense = [kind for kind in kinds if kind.feed is Feed.DENSE or kind.mlp_beside_experts]
    if any(kind.width is None for kind in dense) and shape.intermediate_size is None:
        missing.append("intermediate_size")
    if any(kind.feed is Feed.EXPERTS for kind in kinds):
        known = shape.experts is not None and shape.experts.intermediate_size is not None
        missing += [] if known else ["moe_intermediate_size"]
    return (*missing, *_missing_formats(shape))


def _missing_of_attention(shape: ModelShape, kinds: Iterable[Layer]) -> Iterator[str]:
    if shape.attention_heads is None:
        yield "num_attention_heads"
    if shape.latent is not None:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(shape.latent, name) is None:
                yield name
        return
    own = [kind.sizes for kind in kinds if kind.mixer is Mixer.ATTENTION]
    if not shape.kv_heads and not all(sizes.kv_heads for sizes in own):
        yield "num_key_value_heads"
    if not shape.head_dim and not all(sizes.head_dim for sizes in own):
        yield "head_dim"
    if shape.compressed is not None:
        yield from (name for name in ("q_lora_rank", "o_lora_rank") if getattr(shape.compressed, name) is None)


def _missing_of_states(shape: ModelShape, kinds: Iterable[Layer]) -> Iterator[str]:
    state = shape.state_space
    convolutions = all(kind.mixer is Mixer.CONVOLUTION for kind in kinds if kind.mixer.keeps_state)
    known = state is not None and state.kernel is not None
    known = known and (convolutions or None not in (state and state.head_dim, state and state.state_size))
    if not known:
        yield "the sizes of its state space"


def _missing_formats(shape: ModelShape) -> Iterator[str]:
    quantisation = shape.quantisation
    if quantisation is None or quantisation.algo == "NONE":
        return
    if quantisation.algo == MIXED_PRECISION and not quantisation.modules:
        yield "quantized_layers, which MIXED_PRECISION needs"
        return
    forms = {form for part in ("mixer", "output", "feed", "shared") for form in shape.formats(part)}
    yield from (f"the size of weights in {form.algo}" for form in sorted(forms, key=str) if not form.known)


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
    of_kind = [layer_parts(shape, kind, split) for kind in kinds]
    extra = mtp_layer(subject)

    @cache  # most stages of a long pipeline are equal
    def held(layers: tuple[int, ...], first: bool, last: bool) -> tuple[Elements, int]:
        groups = [(of_kind[kind], count) for kind, count in Counter(layers).items()]
        if last and extra is not None:
            joined = 2 * (shape.hidden_size or 0) ** 2  # eh_proj: embedding and hidden state, side by side
            groups.append(((*layer_parts(shape, extra[0], split), Part("mixer", joined)), extra[1]))
        groups.append((end_parts(shape, split, first=first, last=last), 1))
        total = sum(bytes_of(shape, parts) * count for parts, count in groups)
        return _sum((elements_of(parts), count) for parts, count in groups), round(total)

    stages, start = [], 0
    for stage, size in enumerate(layout.stage_sizes(len(order), subject.config.pp_partition)):
        elements, weight = held(order[start : start + size], stage == 0, stage == layout.pp_size - 1)
        stages.append(StageWeights(stage, size, start, elements, weight))
        start += size
    return tuple(stages)


def total_parameters(shape: ModelShape) -> int | None:
    """Count a language model's parameters, without layers for multi-token prediction; None if the config lacks sizes."""
    return None if missing_sizes(shape) else sum(part.elements * count for part, count in checkpoint_parts(shape))


def checkpoint_bytes(shape: ModelShape) -> int | None:
    """Count the bytes of those parameters, quantised as in the checkpoint; None if the config lacks sizes."""
    if missing_sizes(shape):
        return None
    return round(sum(bytes_of(shape, (part,)) * count for part, count in checkpoint_parts(shape)))


def checkpoint_parts(shape: ModelShape) -> Iterator[tuple[Part, int]]:
    """Yield the parts of a whole language model, each with the number of times that it has it."""
    kinds, order = shape.kinds
    for kind, count in Counter(order).items():
        yield from ((part, count) for part in layer_parts(shape, kinds[kind], Split()))
    yield from ((part, 1) for part in end_parts(shape, Split(), first=True, last=True))


def mtp_layer(subject: LayoutSpec) -> tuple[Layer, int] | None:
    """F6: the layer for multi-token prediction and how often the last stage has it; None without such speculation."""
    shape, speculative = subject.shape, subject.config.speculative
    if speculative is None or (speculative.decoding_type or "").upper() != "MTP" or not shape.nextn_layers:
        return None
    if shape.nextn_layer is None:
        return None
    wanted = speculative.nextn_layers or speculative.max_draft_len or shape.nextn_layers
    return shape.nextn_layer, min(max(1, wanted), shape.nextn_layers)


def _sum(parts: Iterable[tuple[Elements, int]]) -> Elements:
    found = list(parts)
    return Elements(*(sum(getattr(part, name) * count for part, count in found) for name in _PARTS))


_PARTS = Elements.__match_args__
