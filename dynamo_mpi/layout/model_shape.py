# SPDX-License-Identifier: Apache-2.0
"""The shape of a model, for layout rules, memory estimates and the planner. A value that the config lacks is None, never guessed."""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from dynamo_mpi.common.frozen import dataclass

if TYPE_CHECKING:
    from dynamo_mpi.layout.quantisation import Quantisation

# DeepSeek-V3 and its relatives split a dense MLP by a common divisor instead of by tp (E9)
_GCD_FAMILIES = ("deepseek", "kimi", "glm4moe", "glmmoe", "exaonemoe")


class Mixer(Enum):
    """The part of a layer that mixes tokens."""

    ATTENTION = "attention"
    MAMBA2 = "mamba2"
    GATED_DELTA = "gated delta"
    NONE = "none"


class Feed(Enum):
    """The part of a layer after the mixer."""

    DENSE = "dense"
    EXPERTS = "experts"
    NONE = "none"


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        mixer: attention, a state space, or nothing (Nemotron-H has layers of one part).
        feed: MLP, experts or nothing.
        window: tokens that its attention looks back; None for all.
        mixer_quantised: the checkpoint's quantisation covers the mixer's projections.
        feed_quantised: it covers the MLP or the routed experts.
        shared_quantised: it covers the shared experts.
        kv_heads: of its attention, over all ranks; None for the model's own number.
    """

    mixer: Mixer = Mixer.ATTENTION
    feed: Feed = Feed.DENSE
    window: int | None = None
    mixer_quantised: bool = False
    feed_quantised: bool = False
    shared_quantised: bool = False
    kv_heads: int | None = None


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): one latent for all heads instead of KV heads. Sizes in elements, per token or per head."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int | None
    qk_rope_head_dim: int | None
    v_head_dim: int | None


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
    """The state heads of a hybrid model, Mamba2's or the gated delta rule's.

    Args:
        heads: state heads (``mamba_num_heads``, ``linear_num_value_heads``).
        groups: groups that share B and C, or key heads (``n_groups``, ``linear_num_key_heads``).
        head_dim: width of a state head.
        state_size: length of a head's state (``ssm_state_size``, ``linear_key_head_dim``).
        kernel: taps of the convolution.
    """

    heads: int
    groups: int
    head_dim: int | None
    state_size: int | None
    kernel: int | None

    @property
    def conv_dim(self) -> int | None:
        """Channels of the convolution: x, B and C (Mamba2), or q, k and v (gated delta)."""
        if self.head_dim is None or self.state_size is None:
            return None
        return self.heads * self.head_dim + 2 * self.groups * self.state_size


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
        context_length: positions the model was made for.
        latent: multi-head latent attention.
        experts: mixture of experts.
        state_space: state heads of a hybrid.
        layers: each layer, in order; None if the config doesn't specify them.
        output_groups: groups of the output projection (DeepSeek-V4's ``o_groups``).
        index_head_dim: of the sparse-attention indexer (DSA).
        index_heads: of the same.
        output_gate: the query projection also makes a gate of the same width (Qwen3-Next).
        gated_mlp: the MLP has gate, up and down projections; else up and down.
        tied_embeddings: embedding and LM head share their weights, as the config or the model's class has it.
        nextn_layers: layers for multi-token prediction in the checkpoint.
        encoder_decoder: T5, BART, Whisper.
        dtype: of weights that aren't quantised, as torch names it.
        quantisation: of the checkpoint; None if it has none.
        bos_token_id: first token of a sequence.
        model_type: as the config has it, of the language model inside.
        unknown: missing values that rules need.
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
    context_length: int | None = None
    latent: LatentAttention | None = None
    experts: Experts | None = None
    state_space: StateSpace | None = None
    layers: tuple[Layer, ...] | None = None
    output_groups: int | None = None
    index_head_dim: int | None = None
    index_heads: int | None = None
    output_gate: bool = False
    gated_mlp: bool = True
    tied_embeddings: bool | None = None
    nextn_layers: int = 0
    encoder_decoder: bool = False
    dtype: str | None = None
    quantisation: Quantisation | None = None
    bos_token_id: int | None = None
    model_type: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def splits_dense_by_gcd(self) -> bool:
        """E9: whether this is one of the families whose dense and shared MLPs are split by a common divisor."""
        names = (self.name.lower(), self.model_type.replace("_", "").lower())
        return any(name.startswith(_GCD_FAMILIES) for name in names)

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
            return any(layer.feed is feed for layer in self.layers)
        return (self.experts is not None) == (feed is Feed.EXPERTS)

    @property
    def suits_attention_dp(self) -> bool:
        """C1: whether attention DP is meant for this model: it has experts, or latent attention."""
        return self.experts is not None or self.latent is not None
