# SPDX-License-Identifier: Apache-2.0
"""Counts one layer's weights on one rank, in elements and in bytes.

Only large matrices count; norms and biases are less than one per cent of any model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.layout.divisibility import common_split, dense_block
from dynamo_mpi.layout.model_shape import Feed, Mixer

if TYPE_CHECKING:
    from dynamo_mpi.layout.model_shape import Layer, ModelShape

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


def layer_elements(shape: ModelShape, layer: Layer, split: Split) -> Elements:
    """Count one layer's elements on one rank."""
    hidden = shape.hidden_size or 0
    matrices = 3 if shape.gated_mlp else 2
    mixer = dense = routed = shared = router = 0
    if layer.mixer is Mixer.ATTENTION:
        mixer = _latent_attention(shape, split) if shape.latent is not None else _attention(shape, layer, split)
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


def _attention(shape: ModelShape, layer: Layer, split: Split) -> int:
    hidden, heads, kv_heads = shape.hidden_size or 0, shape.attention_heads or 0, layer.kv_heads or shape.kv_heads or 0
    key, value = shape.head_dim or 0, shape.value_size or 0
    queries = hidden * _share(heads, split.attention) * key * (2 if shape.output_gate else 1)
    keys_and_values = hidden * _share(kv_heads, split.attention) * (key + value)
    return queries + keys_and_values + hidden * _share(heads, split.output) * value


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
    """E9: some families divide by the common divisor of width and ranks, within a node; the others by all ranks."""
    if split.whole_mlps:
        return 1
    if not shape.splits_dense_by_gcd:
        return split.dense
    block = dense_block(shape.quantisation) if quantised else 1
    return common_split(width, block, split.dense, split.node)


def end_elements(shape: ModelShape, split: Split, *, first: bool, last: bool) -> Elements:
    """Embedding and LM head (C2, E7, E10): one where they are tied and on the same rank."""
    rows = _share(shape.vocab_size or 0, split.vocabulary) * (shape.hidden_size or 0)
    shared = shape.tied_embeddings and first
    return Elements(embedding=rows if first else 0, head=rows if last and not shared else 0)


def layer_bytes(shape: ModelShape, layer: Layer, part: Elements) -> float:
    """Return the bytes of one layer's elements, quantised as in the checkpoint."""
    plain = dtype_bytes(shape)
    quantisation = shape.quantisation
    packed = quantisation.bytes_per_element if quantisation is not None and quantisation.known else plain
    return (
        part.mixer * (packed if layer.mixer_quantised else plain)
        + (part.dense + part.experts) * (packed if layer.feed_quantised else plain)
        + part.shared * (packed if layer.shared_quantised else plain)
        + part.router * plain
    )
