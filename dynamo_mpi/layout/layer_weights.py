# SPDX-License-Identifier: Apache-2.0
"""Counts one layer's weights on one rank, in elements and in bytes.

Only large matrices count; norms and biases are less than one per cent of any model.
"""

from __future__ import annotations

from collections import Counter

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import common_split, dense_block, splits_dense_by_gcd
from dynamo_mpi.layout.model_shape import Feed, Mixer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.layout.model_shape import Layer, ModelShape
    from dynamo_mpi.layout.quantisation import WeightFormat

HEAVILY_COMPRESSED = 128
"""A ratio from which DeepSeek-V4's attention has no indexer, and its windows don't overlap."""
_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Elements:
    """Elements of one rank's weights, by part.

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
        """The sum."""
        return self.mixer + self.dense + self.experts + self.shared + self.router + self.embedding + self.head


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


def dtype_bytes(shape: ModelShape) -> int:
    """Bytes of an element that isn't quantised; 2 if the config doesn't specify it (`dtype_known`)."""
    return _DTYPE_BYTES.get(shape.dtype or "", 2)


def dtype_known(shape: ModelShape) -> bool:
    """Return whether the config specifies the type of elements."""
    return shape.dtype in _DTYPE_BYTES


@dataclass(frozen=True)
class Part:
    """One rank's elements of a part of a layer, in one number format.

    Args:
        name: a field of `Elements`.
        elements: number of them.
        format: None if they aren't quantised.
    """

    name: str
    elements: int
    format: WeightFormat | None = None


def layer_parts(shape: ModelShape, layer: Layer, split: Split) -> tuple[Part, ...]:
    """Count one layer's elements on one rank, by part and number format."""
    return tuple(part for part in (*_mixer(shape, layer, split), *_feed(shape, layer, split)) if part.elements)


def layer_elements(shape: ModelShape, layer: Layer, split: Split) -> Elements:
    """Count one layer's elements on one rank."""
    return elements_of(layer_parts(shape, layer, split))


def elements_of(parts: Iterable[Part]) -> Elements:
    """Add up parts by their names."""
    counts = Counter[str]()
    for part in parts:
        counts[part.name] += part.elements
    return Elements(**counts)


def bytes_of(shape: ModelShape, parts: Iterable[Part]) -> float:
    """Return the bytes of parts, quantised as in the checkpoint."""
    plain = dtype_bytes(shape)
    return sum(
        part.elements * (plain if part.format is None or not part.format.known else part.format.bytes_per_element)
        for part in parts
    )


def _mixer(shape: ModelShape, layer: Layer, split: Split) -> Iterator[Part]:
    hidden, formats = shape.hidden_size or 0, layer.formats
    if layer.mixer is Mixer.ATTENTION:
        if shape.latent is not None:
            inputs, output = _latent_attention(shape, split)
        elif shape.compressed is not None:
            inputs, output = _compressed_attention(shape, layer, split)
        else:
            inputs, output = _attention(shape, layer, split)
        yield Part("mixer", inputs, formats.mixer)
        yield Part("mixer", output, formats.output)
        yield Part("mixer", _indexer(shape, layer), None)
    elif layer.mixer is Mixer.CONVOLUTION:  # LFM2: one projection to B, C and x, one out
        width = _share(hidden, split.attention)
        yield Part("mixer", 3 * hidden * width, formats.mixer)
        yield Part("mixer", hidden * width, formats.output)
    elif layer.mixer is Mixer.LINEAR:
        yield Part("mixer", hidden * hidden, formats.mixer)
    elif layer.mixer is not Mixer.NONE:
        yield from _state_space(shape, layer, split)
    if shape.per_layer_input:
        yield Part("mixer", 2 * hidden * shape.per_layer_input, formats.mixer)


def _feed(shape: ModelShape, layer: Layer, split: Split) -> Iterator[Part]:
    hidden, formats = shape.hidden_size or 0, layer.formats
    matrices = 3 if shape.gated_mlp else 2
    if layer.feed is Feed.LINEAR:
        yield Part("dense", hidden * hidden, formats.feed)
    if layer.feed is Feed.DENSE or layer.mlp_beside_experts:
        width = layer.width or shape.intermediate_size or 0
        form = formats.shared if layer.mlp_beside_experts else formats.feed
        yield Part("dense", _share(matrices * hidden * width, _mlp_split(shape, width, form, split)), form)
    if layer.feed is not Feed.EXPERTS or shape.experts is None:
        return
    experts = shape.experts
    width, inner = experts.intermediate_size or 0, experts.latent_size or hidden
    slots = _share(max(split.slots or 0, experts.count), split.experts)
    yield Part("experts", matrices * inner * _share(width, split.expert_slices) * slots, formats.feed)
    yield Part("router", hidden * experts.count + (2 * hidden * inner if experts.latent_size else 0))
    width = experts.shared_intermediate_size
    form = None if layer.mlp_beside_experts else formats.shared
    yield Part("shared", _share(matrices * hidden * width, _mlp_split(shape, width, form, split)), form)


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _attention(shape: ModelShape, layer: Layer, split: Split) -> tuple[int, int]:
    """Return the elements of the projections of queries, keys and values, and of the output projection."""
    sizes, hidden = layer.sizes, shape.hidden_size or 0
    heads, kv_heads = sizes.heads or shape.attention_heads or 0, sizes.kv_heads or shape.kv_heads or 0
    key, value = shape.head_sizes(sizes)
    queries = hidden * _share(heads, split.attention) * (key * (2 if shape.output_gate else 1) + shape.head_gate)
    keys_and_values = hidden * _share(kv_heads, split.attention) * (key if sizes.keys_are_values else key + value)
    if sizes.shares_kv:
        keys_and_values = 0
    return queries + keys_and_values, hidden * _share(heads, split.output) * value


def _latent_attention(shape: ModelShape, split: Split) -> tuple[int, int]:
    """MLA: the projections into the latents are replicated, those out of them divided by heads."""
    latent, hidden = shape.latent, shape.hidden_size or 0
    if latent is None:
        return 0, 0
    nope, rope, value = latent.qk_nope_head_dim or 0, latent.qk_rope_head_dim or 0, latent.v_head_dim or 0
    heads = _share(shape.attention_heads or 0, split.attention)
    query_input = latent.q_lora_rank or hidden
    elements = hidden * (latent.q_lora_rank or 0) + hidden * (latent.kv_lora_rank + rope)
    elements += query_input * heads * (nope + rope) + latent.kv_lora_rank * heads * (nope + value)
    elements += hidden * heads * value if shape.output_gate else 0
    return elements, _share(shape.attention_heads or 0, split.output) * value * hidden


def _compressed_attention(shape: ModelShape, layer: Layer, split: Split) -> tuple[int, int]:
    """DeepSeek-V4: low-rank queries, one KV head that is key and value, its compressor, and two steps out (``modeling_deepseek_v4.py``)."""
    compressed, hidden, size = shape.compressed, shape.hidden_size or 0, shape.head_dim or 0
    if compressed is None:
        return 0, 0
    rank, heads = compressed.q_lora_rank or 0, _share(shape.attention_heads or 0, split.attention)
    inputs = hidden * rank + rank * heads * size + hidden * size
    ratio = layer.sizes.compress_ratio
    # keys and gates of the compressor; two series where windows overlap
    inputs += 2 * hidden * size * (2 if 0 < ratio < HEAVILY_COMPRESSED else 1) if ratio else 0
    groups = _share(compressed.output_groups, split.output)
    outputs = heads * size * (compressed.o_lora_rank or 0) + groups * (compressed.o_lora_rank or 0) * hidden
    return inputs, outputs


def _indexer(shape: ModelShape, layer: Layer) -> int:
    """DSA and its relatives: the indexer's queries, keys and weights of heads; every rank holds it whole."""
    size, heads, hidden = shape.index_head_dim, shape.index_heads, shape.hidden_size or 0
    if not size or not heads or not layer.sizes.indexed:
        return 0
    if shape.compressed is not None:
        if not 0 < layer.sizes.compress_ratio < HEAVILY_COMPRESSED:
            return 0
        return (shape.compressed.q_lora_rank or 0) * heads * size + hidden * (4 * size + heads)
    query_input = (shape.latent.q_lora_rank or hidden) if shape.latent is not None else hidden
    weights = heads if shape.latent is not None else 0
    return query_input * heads * size + hidden * (size + weights)


def _state_space(shape: ModelShape, layer: Layer, split: Split) -> Iterator[Part]:
    """One projection in, one out, a convolution between them, and a few numbers per head.

    Mamba2 projects to z and x, B and C, and a step per head; the gated delta rule to q and k, v and z, and two gates per head;
    Kimi's to q, k and v, a gate per head, a decay through `head_dim`, and an output gate, through `head_dim` or whole.
    """
    state, hidden, formats = shape.state_space, shape.hidden_size or 0, layer.formats
    if state is None:
        return
    heads, groups = _share(state.heads, split.attention), _share(state.groups, split.attention)
    size, kernel = state.head_dim or 0, state.kernel or 0
    inner, shared = heads * size, 2 * groups * (state.state_size or 0)
    mamba = layer.mixer is Mixer.MAMBA2
    if layer.mixer is Mixer.KIMI_DELTA:
        through = hidden * size + size * inner
        gate = hidden * inner if state.full_rank_gate else through
        yield Part("mixer", 3 * hidden * inner + hidden * heads + through + gate, formats.mixer)
        convolution = 3 * inner * kernel + inner
    else:
        # the gates per head of the gated delta rule stay as they are in every checkpoint
        yield Part("mixer", hidden * (2 * inner + shared + (heads if mamba else 0)), formats.mixer)
        convolution = (inner + shared) * (kernel + mamba) + (0 if mamba else 2 * hidden * heads)
    yield Part("mixer", convolution + 3 * heads)
    yield Part("mixer", hidden * inner, formats.output)


def _mlp_split(shape: ModelShape, width: int, form: WeightFormat | None, split: Split) -> int:
    """E9: some families divide by the common divisor of width and ranks, within a node; the others by all ranks."""
    if split.whole_mlps:
        return 1
    if not splits_dense_by_gcd(shape):
        return split.dense
    return common_split(width, dense_block(form), split.dense, split.node)


def end_parts(shape: ModelShape, split: Split, *, first: bool, last: bool) -> tuple[Part, ...]:
    """Embedding and LM head (C2, E7, E10): one where they are tied and on the same rank. Gemma-4's layers have an embedding each."""
    hidden = shape.hidden_size or 0
    rows = _share(shape.vocab_size or 0, split.vocabulary) * hidden
    parts = [Part("embedding", rows)] if first else []
    if last and not (shape.tied_embeddings and first):
        tokens = shape.draft_vocab_size or shape.vocab_size or 0
        parts.append(Part("head", _share(tokens, split.vocabulary) * hidden, shape.head_format))
    if first and shape.per_layer_input:
        width = shape.per_layer_input * (shape.num_layers or 0)
        own = _share(shape.per_layer_vocab or shape.vocab_size or 0, split.vocabulary)
        parts.append(Part("embedding", (own + hidden) * width))
    return tuple(parts)
