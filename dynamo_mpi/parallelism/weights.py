# SPDX-License-Identifier: Apache-2.0
"""What the weights of a model come to on each rank, from its shape alone (section J): the first thing that doesn't fit.

Everything is counted in elements of the large matrices; norms and biases are left out, which is less than one per cent of any model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from math import gcd
from typing import TYPE_CHECKING

from dynamo_mpi.parallelism.model_shape import Feed, Layer, Mixer
from dynamo_mpi.parallelism.quantisation import FP8_BLOCK_SCALES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.parallelism.model_shape import ModelShape
    from dynamo_mpi.parallelism.subject import Subject

_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Elements:
    """Elements of one rank's weights, by what they belong to.

    Args:
        mixer: attention's or a state space's projections.
        dense: dense MLPs.
        experts: routed experts.
        shared: shared experts.
        router: routers, with the projections into and out of the width that experts work in.
        embedding: the token embedding.
        head: the LM head.
    """

    mixer: int = 0
    dense: int = 0
    experts: int = 0
    shared: int = 0
    router: int = 0
    embedding: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.mixer + self.dense + self.experts + self.shared + self.router + self.embedding + self.head


@dataclass(frozen=True)
class StageWeights:
    """The weights of each rank of one pipeline stage.

    Args:
        stage: its number.
        layers: transformer layers that it holds, without those for multi-token prediction.
        elements: of one rank.
        bytes: of one rank.
    """

    stage: int
    layers: int
    elements: Elements
    bytes: int


@dataclass(frozen=True)
class Split:
    """Over how many ranks each part of a layer is divided.

    Args:
        attention: query, key and value heads, and state heads.
        output: the output projection, which HELIX divides further.
        dense: MLPs outside the families of E9.
        node: GPUs of a node, where E9 divides no further.
        vocabulary: embedding and LM head.
        experts: shares of the experts.
        expert_slices: slices of one expert.
        slots: expert slots over all ranks; None for one per expert.
        whole_mlps: attention DP: every rank holds dense MLPs whole.
    """

    attention: int = 1
    output: int = 1
    dense: int = 1
    node: int = 1
    vocabulary: int = 1
    experts: int = 1
    expert_slices: int = 1
    slots: int | None = None
    whole_mlps: bool = False


def split_of(subject: Subject) -> Split:
    """Read off a layout how it divides weights (C1, C2, E9, F10)."""
    layout, moe = subject.layout, subject.config.moe
    return Split(
        attention=layout.attention_tp_size,
        output=layout.head_split if layout.is_helix else layout.attention_tp_size,
        dense=layout.dense_tp_size,
        node=subject.cluster.gpus_per_node,
        vocabulary=1 if layout.enable_attention_dp else layout.dense_tp_size,
        experts=layout.moe_ep_size,
        expert_slices=max(1, layout.moe_tp_size),
        slots=moe.num_slots if moe.balanced else None,
        whole_mlps=layout.enable_attention_dp,
    )


def missing_sizes(shape: ModelShape) -> tuple[str, ...]:
    """Name what a config would have to say for its weights to be counted; nothing where they can be."""
    missing = [name for name in ("hidden_size", "vocab_size") if getattr(shape, name) is None]
    if shape.encoder_decoder:
        missing.append("the encoder's layers")
    if shape.layers is None:
        return (*missing, "num_hidden_layers" if shape.num_layers is None else "the kinds of its layers")
    kinds, _ = kinds_of(shape.layers)
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
        yield "the sizes of compressed attention"  # DeepSeek-V4: nothing public says what its kernels hold
    else:
        yield from (
            name for name, size in (("num_key_value_heads", shape.kv_heads), ("head_dim", shape.head_dim)) if not size
        )


def stage_weights(subject: Subject) -> tuple[StageWeights, ...] | None:
    """Count the weights of each pipeline stage's ranks; all ranks of a stage hold as much.

    Returns:
        The stages in order; None where the config doesn't say enough (`missing_sizes`).
    """
    shape = subject.shape
    if missing_sizes(shape) or shape.layers is None:
        return None
    split, layout = split_of(subject), subject.layout
    kinds, order = kinds_of(shape.layers)
    of_kind = [layer_elements(shape, kind, split) for kind in kinds]
    bytes_of_kind = [_layer_bytes(shape, kind, part) for kind, part in zip(kinds, of_kind, strict=True)]
    extra = mtp_layer(subject)
    stages, start = [], 0
    for stage, size in enumerate(layout.stage_sizes(len(order), subject.config.pp_partition)):
        counts = Counter(order[start : start + size])
        start += size
        parts = [(of_kind[kind], count) for kind, count in counts.items()]
        total = sum(bytes_of_kind[kind] * count for kind, count in counts.items())
        last = stage == layout.pp_size - 1
        if last and extra is not None:
            part = layer_elements(shape, extra[0], split)
            joined = 2 * (shape.hidden_size or 0) ** 2  # eh_proj: embedding and hidden state, side by side
            parts += [(part, extra[1]), (Elements(mixer=joined), extra[1])]
            total += (_layer_bytes(shape, extra[0], part) + joined * dtype_bytes(shape)) * extra[1]
        ends = _ends(shape, split, first=stage == 0, last=last)
        total += ends.total * dtype_bytes(shape)
        stages.append(StageWeights(stage, size, _sum([*parts, (ends, 1)]), round(total)))
    return tuple(stages)


def total_parameters(shape: ModelShape) -> int | None:
    """Count a model's parameters, without layers for multi-token prediction; None where the config doesn't say enough."""
    if missing_sizes(shape) or shape.layers is None:
        return None
    kinds, order = kinds_of(shape.layers)
    whole = Split()
    counts = Counter(order)
    layers = sum(layer_elements(shape, kinds[kind], whole).total * count for kind, count in counts.items())
    return layers + _ends(shape, whole, first=True, last=True).total


def dtype_bytes(shape: ModelShape) -> int:
    """Bytes of an element that isn't quantised; 2 where the config doesn't say (`dtype_known`)."""
    return _DTYPE_BYTES.get(shape.dtype or "", 2)


def dtype_known(shape: ModelShape) -> bool:
    """Does the config say what its elements are?"""
    return shape.dtype in _DTYPE_BYTES


def mtp_layer(subject: Subject) -> tuple[Layer, int] | None:
    """F6: the layer for multi-token prediction and how often the last stage holds it; None without such speculation."""
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


class _ByIdentity:
    """A key for caching by which tuple it is: hashing a hundred layers takes longer than counting them."""

    __slots__ = ("layers",)

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers

    def __hash__(self) -> int:
        return id(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.layers is other.layers


def kinds_of(layers: tuple[Layer, ...]) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """Return the different layers of a model, and for each layer in order which of them it is."""
    return _kinds_of(_ByIdentity(layers))


@lru_cache(maxsize=32)
def _kinds_of(key: _ByIdentity) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    numbers: dict[Layer, int] = {}
    order = tuple(numbers.setdefault(layer, len(numbers)) for layer in key.layers)
    return tuple(numbers), order


def layer_elements(shape: ModelShape, layer: Layer, split: Split) -> Elements:
    """Count one layer's elements on one rank."""
    hidden = shape.hidden_size or 0
    matrices = 3 if shape.gated_mlp else 2
    mixer = dense = routed = shared = router = 0
    if layer.mixer is Mixer.ATTENTION:
        mixer = _latent_attention(shape, split) if shape.latent is not None else _attention(shape, split)
    elif layer.mixer is not Mixer.NONE:
        mixer = _state_space(shape, layer.mixer, split)
    if layer.feed is Feed.DENSE:
        width = shape.intermediate_size or 0
        dense = _share(matrices * hidden * width, _mlp_split(shape, width, layer.feed_quantised, split))
    elif layer.feed is Feed.EXPERTS and shape.experts is not None:
        experts = shape.experts
        width, inner = experts.intermediate_size or 0, experts.latent_size or hidden
        slots = _share(max(split.slots or 0, experts.count), split.experts)
        routed = matrices * inner * _share(width, split.expert_slices) * slots
        router = hidden * experts.count + (2 * hidden * inner if experts.latent_size else 0)
        width = experts.shared_intermediate_size
        shared = _share(matrices * hidden * width, _mlp_split(shape, width, layer.shared_quantised, split))
    return Elements(mixer, dense, routed, shared, router)


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _attention(shape: ModelShape, split: Split) -> int:
    hidden, dim, heads = shape.hidden_size or 0, shape.head_dim or 0, shape.attention_heads or 0
    queries = hidden * _share(heads, split.attention) * dim * (2 if shape.output_gate else 1)
    keys_and_values = 2 * hidden * _share(shape.kv_heads or 0, split.attention) * dim
    return queries + keys_and_values + hidden * _share(heads, split.output) * dim


def _latent_attention(shape: ModelShape, split: Split) -> int:
    """MLA: the projections into the latents are replicated, those out of them divided by heads. The indexer (DSA) is replicated."""
    latent, hidden = shape.latent, shape.hidden_size or 0
    if latent is None:
        return 0
    nope, rope, value = latent.qk_nope_head_dim or 0, latent.qk_rope_head_dim or 0, latent.v_head_dim or 0
    heads = _share(shape.attention_heads or 0, split.attention)
    query_input = latent.q_lora_rank or hidden
    elements = hidden * (latent.q_lora_rank or 0) + hidden * (latent.kv_lora_rank + rope)
    elements += query_input * heads * (nope + rope) + latent.kv_lora_rank * heads * (nope + value)
    elements += _share(shape.attention_heads or 0, split.output) * value * hidden
    if shape.index_head_dim and shape.index_heads:
        elements += query_input * shape.index_heads * shape.index_head_dim
        elements += hidden * (shape.index_head_dim + shape.index_heads)
    return elements


def _state_space(shape: ModelShape, mixer: Mixer, split: Split) -> int:
    """One projection in, one out, a convolution between them, and a few numbers per head.

    Mamba2 projects to z and x, B and C, and a step per head; the gated delta rule to q and k, v and z, and two gates per head.
    """
    state, hidden = shape.state_space, shape.hidden_size or 0
    if state is None:
        return 0
    heads, groups = _share(state.heads, split.attention), _share(state.groups, split.attention)
    inner, shared = heads * (state.head_dim or 0), 2 * groups * (state.state_size or 0)
    per_head = 1 if mixer is Mixer.MAMBA2 else 2
    into = hidden * (2 * inner + shared + per_head * heads)
    convolution = (inner + shared) * ((state.kernel or 0) + (1 if mixer is Mixer.MAMBA2 else 0))
    return into + convolution + 3 * heads + hidden * inner


def _mlp_split(shape: ModelShape, width: int, quantised: bool, split: Split) -> int:
    """E9: some families divide by what width and ranks have in common, within a node; the others by all ranks."""
    if split.whole_mlps:
        return 1
    if not shape.splits_dense_by_gcd:
        return split.dense
    blocks = quantised and shape.quantisation is not None and shape.quantisation.algo == FP8_BLOCK_SCALES
    common = gcd(width // 128 if blocks else width, split.dense) or 1
    return gcd(common, split.node) if common > split.node else common


def _ends(shape: ModelShape, split: Split, *, first: bool, last: bool) -> Elements:
    """Embedding and LM head (C2, E7, E10): one where they are tied and on the same rank."""
    rows = _share(shape.vocab_size or 0, split.vocabulary) * (shape.hidden_size or 0)
    # transformers' Gemma classes tie by default, and their configs may not say it
    tied = shape.model_type.startswith("gemma") if shape.tied_embeddings is None else shape.tied_embeddings
    return Elements(embedding=rows if first else 0, head=rows if last and not (tied and first) else 0)


def _layer_bytes(shape: ModelShape, layer: Layer, part: Elements) -> float:
    plain = dtype_bytes(shape)
    quantisation = shape.quantisation
    packed = quantisation.bytes_per_element if quantisation is not None and quantisation.known else plain
    return (
        part.mixer * (packed if layer.mixer_quantised else plain)
        + (part.dense + part.experts) * (packed if layer.feed_quantised else plain)
        + part.shared * (packed if layer.shared_quantised else plain)
        + part.router * plain
    )


def _sum(parts: Iterable[tuple[Elements, int]]) -> Elements:
    found = list(parts)
    return Elements(*(sum(getattr(part, name) * count for part, count in found) for name in _PARTS))


_PARTS = tuple(field.name for field in fields(Elements))
