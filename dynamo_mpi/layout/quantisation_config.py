# SPDX-License-Identifier: Apache-2.0
"""Reads how a checkpoint is quantised, from ``quantization_config`` (Hugging Face) or ``hf_quant_config.json`` (ModelOpt)."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
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
    from collections.abc import Iterator

    from dynamo_mpi.common.config_reader import ConfigReader

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
