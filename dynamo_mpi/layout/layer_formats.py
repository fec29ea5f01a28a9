# SPDX-License-Identifier: Apache-2.0
"""Gives each layer of a model the number formats of its weights, by the names of its modules in the checkpoint."""

from __future__ import annotations

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.model_shape import Feed, Layer, LayerFormats, Mixer

if TYPE_CHECKING:
    from collections.abc import Hashable

    from dynamo_mpi.layout.quantisation import Quantisation, WeightFormat

# below `layers.<n>`, in the checkpoints of every family; a part is excluded if one of its names is
_INPUTS = {
    Mixer.ATTENTION: (
        *("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj"),
        *("mixer.q_proj", "attention.q_proj", "attn.wq_b"),
    ),
    Mixer.MAMBA2: ("mixer.in_proj", "mamba.in_proj"),
    Mixer.GATED_DELTA: ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv"),
    Mixer.KIMI_DELTA: ("self_attn.q_proj", "linear_attn.q_proj"),
    Mixer.CONVOLUTION: ("conv.in_proj",),
    Mixer.LINEAR: ("self_attn.linear_attn",),
}
_OUTPUTS = {
    Mixer.ATTENTION: (
        *("self_attn.o_proj", "self_attn.out_proj", "mixer.o_proj", "attention.o_proj", "attn.wo_b"),
        "self_attn.o_b_proj",
    ),
    Mixer.MAMBA2: ("mixer.out_proj", "mamba.out_proj"),
    Mixer.GATED_DELTA: ("linear_attn.out_proj",),
    Mixer.KIMI_DELTA: ("self_attn.o_proj", "linear_attn.o_proj"),
    Mixer.CONVOLUTION: ("conv.out_proj",),
}
_DENSE = ("mlp.down_proj", "mlp.gate_up_proj", "feed_forward.down_proj", "feed_forward.w2", "mixer.down_proj")
_BESIDE = ("mlp.down_proj", "mlp.gate_up_proj")
_ROUTED_BESIDE = ("experts.0.down_proj", "experts.down_proj", "moe.experts.0.down_proj")
_ROUTED = (
    *("mlp.experts.0.down_proj", "mlp.experts.down_proj", "feed_forward.experts.down_proj"),
    *("block_sparse_moe.experts.0.w2", "block_sparse_moe.experts.0.down_proj", "mixer.experts.0.down_proj"),
    *("ffn.experts.0.w2", "moe.down_proj"),
)
_SHARED = (
    *("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "feed_forward.shared_expert.down_proj"),
    *("block_sparse_moe.shared_experts.down_proj", "mixer.shared_experts.down_proj", "ffn.shared_experts.w2"),
    *("share_expert.down_proj", "mlp.shared_mlp.down_proj"),
)


def with_formats(
    layers: tuple[Layer, ...], quantisation: Quantisation | None, experts: WeightFormat | None = None
) -> tuple[Layer, ...]:
    """Return the layers with the number formats of their weights.

    Args:
        layers: without formats, in order.
        quantisation: the checkpoint's.
        experts: format of routed experts, where the config has a key of its own for it (DeepSeek-V4).
    """
    if quantisation is None:
        return layers
    made: dict[Hashable, Layer] = {}
    found = []
    for index, layer in enumerate(layers):
        kind = (layer, quantisation.key_of(index))
        known = made.get(kind)
        if known is None:
            known = made[kind] = replace(layer, formats=_formats(index, layer, quantisation, experts))
        found.append(known)
    return tuple(found)


def mtp_format(layer: Layer, index: int, quantisation: Quantisation | None, experts: WeightFormat | None) -> Layer:
    """Return a layer for multi-token prediction with its formats: checkpoints name it ``mtp``, or number it after the others."""
    if quantisation is None:
        return layer
    if any(name.startswith(("mtp", "model.mtp")) for name in quantisation.excluded):
        base = quantisation.base
        return replace(layer, formats=LayerFormats(base, base, (base and experts) or base, base))
    return replace(layer, formats=_formats(index, layer, quantisation, experts))


def _formats(index: int, layer: Layer, quantisation: Quantisation, experts: WeightFormat | None) -> LayerFormats:
    def form(names: tuple[str, ...]) -> WeightFormat | None:
        return quantisation.format_of(f"layers.{index}.{name}" for name in names) if names else None

    feed = shared = None
    if layer.feed is Feed.EXPERTS:
        feed = form(_ROUTED_BESIDE if layer.mlp_beside_experts else _ROUTED)
        shared = form(_BESIDE if layer.mlp_beside_experts else _SHARED)
        if experts is not None and not quantisation.modules:
            feed = experts
    elif layer.feed is not Feed.NONE:
        feed = form(_DENSE)
    return LayerFormats(form(_INPUTS.get(layer.mixer, ())), form(_OUTPUTS.get(layer.mixer, ())), feed, shared)
