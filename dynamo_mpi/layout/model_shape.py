# SPDX-License-Identifier: Apache-2.0
"""The shape of a model, for layout rules, memory estimates and the planner. A value that the config lacks is None, never guessed."""

from __future__ import annotations

from enum import Enum
from functools import cached_property

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_mpi.layout.quantisation import Quantisation, WeightFormat


class Mixer(Enum):
    """The part of a layer that mixes tokens."""

    ATTENTION = "attention"
    MAMBA2 = "mamba2"
    GATED_DELTA = "gated delta"
    KIMI_DELTA = "kimi delta"
    CONVOLUTION = "convolution"
    LINEAR = "linear"
    NONE = "none"

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps a state of each request instead of each token's keys and values."""
        return self in (Mixer.MAMBA2, Mixer.GATED_DELTA, Mixer.KIMI_DELTA, Mixer.CONVOLUTION)


class Feed(Enum):
    """The part of a layer after the mixer."""

    DENSE = "dense"
    EXPERTS = "experts"
    LINEAR = "linear"
    NONE = "none"


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of one layer's attention that differ from the model's; None for the model's own.

    Args:
        heads: query heads, over all ranks.
        kv_heads: key/value heads, over all ranks.
        head_dim: elements of a head.
        value_head_dim: elements of a value head, if it isn't as long.
        keys_are_values: one projection makes keys and values (Gemma-4's global layers).
        shares_kv: it reads the keys and values of an earlier layer.
        compress_ratio: tokens that share one entry of the compressed KV cache (DeepSeek-V4); 0 for none.
        indexed: it has a sparse-attention indexer of its own, if the model has any.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    keys_are_values: bool = False
    shares_kv: bool = False
    compress_ratio: int = 0
    indexed: bool = True


@dataclass(frozen=True)
class LayerFormats:
    """Number formats of one layer's weights; None where they aren't quantised.

    Args:
        mixer: the mixer's projections of its input.
        output: its output projection.
        feed: the MLP, or the routed experts.
        shared: shared experts, or the MLP beside the experts.
    """

    mixer: WeightFormat | None = None
    output: WeightFormat | None = None
    feed: WeightFormat | None = None
    shared: WeightFormat | None = None


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        mixer: attention, a state space, or nothing (Nemotron-H has layers of one part).
        feed: MLP, experts or nothing.
        window: tokens that its attention looks back; None for all.
        formats: number formats of its weights.
        sizes: of its attention, where they aren't the model's.
        width: of its dense MLP; None for the model's own.
        mlp_beside_experts: it has a dense MLP and experts (Gemma-4).
    """

    mixer: Mixer = Mixer.ATTENTION
    feed: Feed = Feed.DENSE
    window: int | None = None
    formats: LayerFormats = LayerFormats()
    sizes: AttentionSizes = AttentionSizes()
    width: int | None = None
    mlp_beside_experts: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): one latent for all heads instead of KV heads. Sizes in elements, per token or per head."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int | None
    qk_rope_head_dim: int | None
    v_head_dim: int | None


@dataclass(frozen=True)
class CompressedAttention:
    """DeepSeek-V4's attention: one KV head, low-rank queries and grouped low-rank outputs.

    Args:
        q_lora_rank: width of the queries' latent.
        o_lora_rank: width of one output group's latent.
        output_groups: number of output groups.
    """

    q_lora_rank: int | None
    o_lora_rank: int | None
    output_groups: int


@dataclass(frozen=True)
class Experts:
    """The mixture of experts.

    Args:
        count: routed experts of a layer.
        per_token: experts that a token goes to.
        intermediate_size: width of one expert.
        shared_intermediate_size: width of all shared experts of a layer together; 0 for none.
        latent_size: width that routed experts work in, where it isn't the model's (Nemotron-3-Super).
    """

    count: int
    per_token: int | None
    intermediate_size: int | None
    shared_intermediate_size: int = 0
    latent_size: int | None = None


@dataclass(frozen=True)
class StateSpace:
    """The state heads of a hybrid model, Mamba2's or a delta rule's; of a convolution only `kernel` counts.

    Args:
        heads: state heads (``mamba_num_heads``, ``linear_num_value_heads``).
        groups: groups that share B and C, or key heads (``n_groups``, ``linear_num_key_heads``).
        head_dim: width of a state head.
        state_size: length of a head's state (``ssm_state_size``, ``linear_key_head_dim``).
        kernel: taps of the convolution.
        full_rank_gate: the output gate is one matrix (Kimi-K3) instead of two through `head_dim`.
        dtype: of the states, as the config has it.
    """

    heads: int
    groups: int
    head_dim: int | None
    state_size: int | None
    kernel: int | None
    full_rank_gate: bool = False
    dtype: str | None = None

    @property
    def conv_dim(self) -> int | None:
        """Channels of the convolution: x, B and C (Mamba2), or q, k and v (gated delta)."""
        if self.head_dim is None or self.state_size is None:
            return None
        return self.heads * self.head_dim + 2 * self.groups * self.state_size


@dataclass(frozen=True)
class Encoder:
    """An encoder of images, video or sound, beside the language model.

    Args:
        key: its section in the config.
        parameters: of the encoder and its projector; None if the config lacks sizes.
        missing: those sizes.
    """

    key: str
    parameters: int | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """A model's values that layout rules need.

    Args:
        name: the architecture's class, or the model type.
        attention_heads: query heads, over all ranks.
        kv_heads: key/value heads, over all ranks; None with latent attention.
        head_dim: elements of a head.
        value_head_dim: elements of a value head; None if it is as long as the others.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the dense MLP.
        vocab_size: number of tokens.
        draft_vocab_size: tokens that a draft model's head knows, if they are fewer (EAGLE-3).
        context_length: positions the model was made for.
        latent: multi-head latent attention.
        experts: mixture of experts.
        state_space: state heads of a hybrid.
        layers: each layer, in order; None if the config doesn't specify them, or has kinds that aren't known here.
        unknown_layers: the keys with such kinds.
        compressed: compressed attention (DeepSeek-V4).
        index_head_dim: of the sparse-attention indexer (DSA).
        index_heads: of the same.
        output_gate: the query projection also makes a gate of the same width (Qwen3-Next, Kimi-K3).
        head_gate: attention has a gate of one element per head (Step-3.5).
        gated_mlp: the MLP has gate, up and down projections; else up and down.
        tied_embeddings: embedding and LM head share their weights, as the config or the model's class has it.
        per_layer_input: width of each layer's own embedding of the tokens (Gemma-4); 0 for none.
        per_layer_vocab: tokens of that embedding.
        head_format: number format of the LM head; None if it isn't quantised.
        nextn_layers: layers for multi-token prediction in the checkpoint.
        nextn_layer: one of them; None if the model has none, or its layers aren't known.
        encoder_decoder: T5, BART, Whisper.
        dtype: of weights that aren't quantised, as torch names it.
        quantisation: of the checkpoint; None if it has none.
        bos_token_id: first token of a sequence.
        model_type: as the config has it, of the language model inside.
        encoders: encoders of other inputs than text.
        missing: values that rules need and the config lacks, and values of keys that aren't known.
        unread: keys that were neither used nor are known to be harmless.
        inexact: those of them that may change a figure.
    """

    name: str
    attention_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    draft_vocab_size: int | None = None
    context_length: int | None = None
    latent: LatentAttention | None = None
    experts: Experts | None = None
    state_space: StateSpace | None = None
    layers: tuple[Layer, ...] | None = None
    unknown_layers: tuple[str, ...] = ()
    compressed: CompressedAttention | None = None
    index_head_dim: int | None = None
    index_heads: int | None = None
    output_gate: bool = False
    head_gate: bool = False
    gated_mlp: bool = True
    tied_embeddings: bool | None = None
    per_layer_input: int = 0
    per_layer_vocab: int = 0
    head_format: WeightFormat | None = None
    nextn_layers: int = 0
    nextn_layer: Layer | None = None
    encoder_decoder: bool = False
    dtype: str | None = None
    quantisation: Quantisation | None = None
    bos_token_id: int | None = None
    model_type: str = ""
    encoders: tuple[Encoder, ...] = ()
    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()

    @property
    def value_size(self) -> int | None:
        """Elements of a value head, also for latent attention."""
        return self.latent.v_head_dim if self.latent is not None else self.value_head_dim or self.head_dim

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
        """The distinct layers, and for each layer in order the index of its kind: hashing a hundred layers takes longer than counting."""
        numbers: dict[Layer, int] = {}
        order = tuple(numbers.setdefault(layer, len(numbers)) for layer in self.layers or ())
        return tuple(numbers), order

    def has(self, feed: Feed) -> bool:
        """Return whether any layer has this kind of feed-forward part; without a list of layers, the sizes decide."""
        if self.layers is not None:
            beside = feed is Feed.DENSE
            return any(layer.feed is feed or (beside and layer.mlp_beside_experts) for layer in self.kinds[0])
        return (self.experts is not None) == (feed is Feed.EXPERTS)

    def head_sizes(self, own: AttentionSizes) -> tuple[int, int]:
        """Return the elements of a key head and of a value head of a layer; 0 where they aren't known."""
        if own.head_dim is None:
            return self.head_dim or 0, own.value_head_dim or self.value_size or 0
        return own.head_dim, own.value_head_dim or own.head_dim

    @property
    def output_groups(self) -> int | None:
        """Groups of the output projection (DeepSeek-V4's ``o_groups``); None if it has none."""
        return None if self.compressed is None else self.compressed.output_groups

    @property
    def head_counts(self) -> tuple[int, ...]:
        """The numbers of query heads of its attention layers, ascending; more than one if layers differ."""
        own = [layer.sizes.heads for layer in self.kinds[0] if layer.mixer is Mixer.ATTENTION]
        return _distinct([*own, None], self.attention_heads)

    @property
    def kv_head_counts(self) -> tuple[int, ...]:
        """The numbers of KV heads of its attention layers, ascending; more than one if layers differ, none with latent attention."""
        layers = [layer for layer in self.kinds[0] if layer.mixer is Mixer.ATTENTION and not layer.sizes.shares_kv]
        alike = self.layers is None or self.latent is not None
        return _distinct([None] if alike else [layer.sizes.kv_heads for layer in layers], self.kv_heads)

    @property
    def dense_widths(self) -> tuple[int, ...]:
        """The widths of its dense MLPs, ascending; more than one if layers differ."""
        own = [layer.width for layer in self.kinds[0] if layer.feed is Feed.DENSE or layer.mlp_beside_experts]
        return _distinct([None] if self.layers is None else own, self.intermediate_size)

    def formats(self, part: str, *, feed: Feed | None = None) -> tuple[WeightFormat, ...]:
        """Return the distinct number formats of a part of its layers, without those that aren't quantised.

        Args:
            part: a field of `LayerFormats`.
            feed: only layers with this feed-forward part.
        """
        found = (getattr(layer.formats, part) for layer in self.kinds[0] if feed is None or layer.feed is feed)
        return tuple(dict.fromkeys(form for form in found if form is not None))

    @property
    def suits_attention_dp(self) -> bool:
        """C1: whether attention DP is meant for this model: it has experts, or latent attention."""
        return self.experts is not None or self.latent is not None


def _distinct(own: Iterable[int | None], default: int | None) -> tuple[int, ...]:
    """Return the distinct sizes of layers, ascending; None stands for the model's."""
    return tuple(sorted({size or default or 0 for size in own} - {0}))
