# SPDX-License-Identifier: Apache-2.0
"""Reads the encoders of images, video and sound beside a language model: an encode worker holds them alone, every other worker them too.

The parameters are those of a plain transformer encoder and its projector: within a few per cent for the families that name their sizes as
below. An encoder that lacks one of the sizes is not counted, and named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.model_shape import Encoder

if TYPE_CHECKING:
    from dynamo_mpi.common.config_reader import ConfigReader

_SECTIONS = ("vision_config", "audio_config", "vision_tower_config", "speech_config", "sound_config")
_WITHOUT_LANGUAGE = ("thinker_config",)  # Qwen-Omni keeps them inside
# encoders whose MLP has a gate
_GATED = ("qwen2_5_vl", "pixtral", "gemma4_vision", "step3", "llama4_vision_gated")


def read_encoders(config: ConfigReader) -> tuple[Encoder, ...]:
    """Read all encoders of a config.

    Raises:
        ConfigFileError: a size in one isn't a whole number.
    """
    holders = [config, *(config.section(key) for key in _WITHOUT_LANGUAGE if isinstance(config.values.get(key), dict))]
    return tuple(
        _encoder(holder.section(key), key)
        for holder in holders
        for key in _SECTIONS
        if isinstance(holder.values.get(key), dict) and holder.values[key]
    )


def _encoder(section: ConfigReader, key: str) -> Encoder:
    layers = section.size(
        "num_hidden_layers", "depth", "vt_num_hidden_layers", "encoder_layers", "layers", "num_layers"
    )
    hidden = section.size("hidden_size", "vt_hidden_size", "embed_dim", "width", "d_model")
    # Qwen2-VL: hidden_size is the language model's, embed_dim the encoder's
    if section.has("embed_dim") and section.has("depth") and section.has("mlp_ratio"):
        hidden = section.size("embed_dim")
    width = section.size("intermediate_size", "vt_intermediate_size", "encoder_ffn_dim")
    if width is None and hidden is not None and section.has("mlp_ratio"):
        ratio = section.number("mlp_ratio") or 0.0
        width = round(hidden * ratio) if 0 < ratio < 100 else None
    missing = tuple(
        f"{key}.{name}"
        for name, size in (("num_hidden_layers", layers), ("hidden_size", hidden), ("intermediate_size", width))
        if size is None
    )
    if layers is None or hidden is None or width is None:
        return Encoder(key, None, missing)
    kind = section.text("model_type") or ""
    matrices = 3 if kind.startswith(_GATED) or section.text("hidden_act") == "silu" else 2
    patch = section.size("patch_size") or 0
    embedding = 3 * patch * patch * (section.size("temporal_patch_size") or 1) * hidden
    out = section.size("out_hidden_size", "text_hidden_size", "output_dim", "projection_dim") or hidden
    merged = hidden * _merged(section)
    projector = merged * merged + merged * out
    return Encoder(key, layers * (4 * hidden * hidden + matrices * hidden * width) + embedding + projector)


def _merged(section: ConfigReader) -> int:
    """Return how many patches become one token."""
    kernel = section.sizes("merge_kernel_size") if isinstance(section.values.get("merge_kernel_size"), list) else None
    if kernel and len(kernel) == 2 and max(kernel) <= 16:
        return kernel[0] * kernel[1]
    side = section.size("spatial_merge_size", "spatial_patch_merge") or 1
    return side * side if side <= 16 else 1
