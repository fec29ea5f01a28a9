# SPDX-License-Identifier: Apache-2.0
"""Reads how a checkpoint is quantised, from ``quantization_config`` (Hugging Face) or ``hf_quant_config.json`` (ModelOpt), and gives
each layer its weights' formats, by the names of its modules in the checkpoint."""

from __future__ import annotations

from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.model_shape import Feed, Layer, LayerFormats, Mixer
from dynamo_mpi.layout.quantisation import (
    FP8,
    FP8_BLOCK,
    FP8_BLOCK_SCALES,
    FP8_ROWWISE,
    MIXED_PRECISION,
    MXFP4,
    MXFP8,
    NVFP4,
    W4A16_AWQ,
    W4A16_GPTQ,
    Quantisation,
    WeightFormat,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from dynamo_mpi.common.config_reader import ConfigReader
    from dynamo_mpi.layout.quantisation import Quantisation, WeightFormat

# ModelOpt's name for block-scaled FP8 weights
_ALIASES = {"FP8_PB_WO": FP8_BLOCK_SCALES}
_PLAIN_METHODS = {
    "fbgemm_fp8": FP8_ROWWISE,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "awq": W4A16_AWQ,
    "gptq": W4A16_GPTQ,
}


def read_quantisation(config: ConfigReader, quant_file: ConfigReader | None) -> Quantisation | None:
    """Read a checkpoint's quantisation, ModelOpt's own file first, as TensorRT-LLM does.

    Args:
        config: the whole ``config.json``.
        quant_file: ``hf_quant_config.json``, if it exists.

    Raises:
        ConfigFileError: one of the values has the wrong type.
    """
    section = next(
        (
            holder.section("quantization_config")
            for holder in (config, *(config.section(key) for key in ("text_config", "llm_config") if config.has(key)))
            if holder.has("quantization_config")
        ),
        None,
    )
    named = None if section is None else _hugging_face(section)
    if quant_file is not None and quant_file.has("quantization"):
        base = None if section is None else _base(section)
        return _modelopt(quant_file.section("quantization"), "hf_quant_config.json", base)
    return named


def _modelopt(section: ConfigReader, source: str, base: WeightFormat | None) -> Quantisation | None:
    algo = section.text("quant_algo")
    kv_algo = section.text("kv_cache_quant_algo")
    if algo is None and kv_algo is None:
        return None
    name = _canonical(algo or "none")
    modules = _modules(section) if name == MIXED_PRECISION else ()
    return Quantisation(
        algo=name,
        group_size=section.size("group_size"),
        kv_algo=kv_algo,
        excluded=_names(section, "exclude_modules"),
        certain=name != "NONE" and (name != MIXED_PRECISION or bool(modules)),
        source=source,
        modules=modules,
        base=base if name == MIXED_PRECISION else None,
    )


def _modules(section: ConfigReader) -> tuple[tuple[str, WeightFormat], ...]:
    """Read ``quantized_layers``: the modules of a checkpoint of mixed precision. They repeat a few formats thousands of times."""
    made: dict[tuple[object, object], WeightFormat] = {}
    found = []
    for name, values in section.section("quantized_layers").values.items():
        algo, size = (values.get("quant_algo"), values.get("group_size")) if isinstance(values, dict) else (None, None)
        if not isinstance(algo, str) or not (size is None or (type(size) is int and size > 0)):
            raise section.section("quantized_layers").bad(name, "a mapping with quant_algo, and a positive group_size")
        form = made.setdefault((algo, size), WeightFormat(_canonical(algo), size))
        found.append((name, form))
    return tuple(found)


def _base(section: ConfigReader) -> WeightFormat | None:
    """Return the format of a checkpoint before ModelOpt quantised some of its modules further; None for the model's dtype."""
    if section.text("quant_method") != "fp8":
        return None
    block = section.sizes("weight_block_size")
    return WeightFormat(FP8_BLOCK_SCALES, block[-1]) if block else WeightFormat(FP8)


def _hugging_face(section: ConfigReader) -> Quantisation | None:
    source = "quantization_config"
    excluded = tuple(
        name
        for key in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
        for name in _names(section, key)
    )
    kv_scheme = section.values.get("kv_cache_scheme", section.values.get("kv_cache_quant_algo"))
    if isinstance(kv_scheme, dict):
        kv_scheme = NVFP4 if kv_scheme.get("num_bits") == 4 else FP8
    kv_algo = kv_scheme if isinstance(kv_scheme, str) else None
    algo, method = section.text("quant_algo"), section.text("quant_method")
    if algo is not None:
        name = _canonical(algo)
        mixed = name == MIXED_PRECISION
        modules = _modules(section) if mixed else ()
        base = _base(section) if mixed else None
        certain = not mixed or bool(modules)
        return Quantisation(name, section.size("group_size"), kv_algo, excluded, certain, source, modules, base)
    if method is None:
        return None
    if method == "fp8":
        form = _base(section) or WeightFormat(FP8)
        return Quantisation(form.algo, form.group_size, kv_algo, excluded, True, source)
    if method == "compressed-tensors":
        return _compressed_tensors(section, kv_algo, excluded)
    group_size = (
        section.size("group_size") if method in ("awq", "gptq") and section.values.get("group_size") != -1 else None
    )
    if _PLAIN_METHODS.get(method) in (W4A16_AWQ, W4A16_GPTQ) and section.size("bits", "w_bit") == 8:
        return Quantisation("W8A16", None, kv_algo, excluded, True, source)
    return Quantisation(
        _PLAIN_METHODS.get(method, method), group_size, kv_algo, excluded, method in _PLAIN_METHODS, source
    )


def _compressed_tensors(section: ConfigReader, kv_algo: str | None, excluded: tuple[str, ...]) -> Quantisation:
    """Read compressed-tensors' groups: each has a format, and names the modules, or the class of modules, that it is for."""
    groups = section.values.get("config_groups")
    found = list(_groups(groups)) if isinstance(groups, dict) else []
    formats = {form for _, form in found}
    if not found or not all(form.known for form in formats):
        unknown = next((form for form in formats if not form.known), WeightFormat("compressed-tensors"))
        return Quantisation(unknown.algo, unknown.group_size, kv_algo, excluded, False, "quantization_config")
    plain = all(target == "Linear" for target, _ in found)
    form = found[0][1]
    if plain and len(found) == 1:
        return Quantisation(
            form.algo, form.group_size, kv_algo, excluded, True, "quantization_config", covers_head=True
        )
    # the first match counts, so names go before the class that all linear layers have
    modules = tuple(
        sorted(
            (("*" if target == "Linear" else target, form) for target, form in found), key=lambda pair: pair[0] == "*"
        )
    )
    algo, size = (form.algo, form.group_size) if len(formats) == 1 else (MIXED_PRECISION, None)
    # other classes than Linear, e.g. a fused expert of a model's own, can't be recognised by name
    certain = all("." in target or target.startswith("re:") or target == "Linear" for target, _ in found)
    return Quantisation(algo, size, kv_algo, excluded, certain, "quantization_config", modules, covers_head=True)


def _groups(groups: dict[str, Any]) -> Iterator[tuple[str, WeightFormat]]:
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets", ["Linear"]) if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not isinstance(targets, list):
            yield "Linear", WeightFormat("compressed-tensors")
            continue
        form = _weights(weights)
        for target in targets:
            yield str(target), form


def _weights(weights: dict[str, Any]) -> WeightFormat:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    size = weights.get("group_size")
    size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
    if (bits, kind) == (8, "float"):
        if size == 32:
            return WeightFormat(MXFP8, size)
        named = {"block": FP8_BLOCK_SCALES, "channel": FP8_ROWWISE}.get(str(strategy), FP8)
        return WeightFormat(named, FP8_BLOCK if named == FP8_BLOCK_SCALES else None)
    if (bits, kind) == (8, "int"):
        return WeightFormat("INT8")
    if (bits, kind) == (4, "float"):
        return WeightFormat(MXFP4 if size == 32 else NVFP4, size)
    if (bits, kind) == (4, "int"):
        return WeightFormat(W4A16_AWQ, size)
    return WeightFormat("compressed-tensors", size)


def _canonical(algo: str) -> str:
    return _ALIASES.get(algo.upper(), algo.upper())


def _names(section: ConfigReader, key: str) -> tuple[str, ...]:
    value = section.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise section.bad(key, "a list of module names")
    return tuple(value)


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
