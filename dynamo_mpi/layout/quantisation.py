# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is quantised, from ``quantization_config`` (Hugging Face) or ``hf_quant_config.json`` (ModelOpt), with its exclusions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.frozen import dataclass

if TYPE_CHECKING:
    import re

    from dynamo_mpi.common.config_reader import Reader

# names as TensorRT-LLM's QuantAlgo has them
FP8 = "FP8"
FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
FP8_ROWWISE = "FP8_ROWWISE"
NVFP4 = "NVFP4"
MXFP4 = "MXFP4"
W4A16_AWQ = "W4A16_AWQ"
W4A8_AWQ = "W4A8_AWQ"
W4A16_GPTQ = "W4A16_GPTQ"
MIXED_PRECISION = "MIXED_PRECISION"
# formats whose groups the checkpoint chooses, and those of microscaling
GROUPED = (W4A16_AWQ, W4A8_AWQ, W4A16_GPTQ)
MICROSCALED = (MXFP4, "W4A16_MXFP4", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8")
FP8_BLOCK = 128
NVFP4_BLOCK = 16

_FORMATS: dict[str, tuple[float, int]] = {
    # bytes of an element with its share of the scales (section J of TensorRT-LLM's rules), elements of a scaling block
    FP8: (1.0, 1),
    FP8_ROWWISE: (1.0, 1),
    "FP8_PER_CHANNEL_PER_TOKEN": (1.0, 1),
    FP8_BLOCK_SCALES: (1.0 + 4 / FP8_BLOCK**2, FP8_BLOCK),
    NVFP4: (0.5 + 1 / NVFP4_BLOCK, NVFP4_BLOCK),
    **dict.fromkeys(MICROSCALED, (0.5 + 1 / 32, 32)),
    **dict.fromkeys(GROUPED, (0.5 + 2 / 128, 128)),
    "W8A16": (1.0, 1),
    "W8A8_SQ_PER_CHANNEL": (1.0, 1),
    "INT8": (1.0, 1),
}


# parts of a model whose layers have numbers of their own
_OTHER_PARTS = ("vision", "visual", "image", "audio", "speech", "mtp")
# the prefix of `layers.<n>` in a regular expression, with escaped dots or not
_ABOVE_LAYERS = r"\^?(?:(?:language_model|model)\\?\.)*"


@dataclass(frozen=True)
class Quantisation:
    """A checkpoint's quantisation.

    Args:
        algo: TensorRT-LLM's name of the format, or the checkpoint's own if TensorRT-LLM's isn't known.
        group_size: elements that share a scale, along the reduced dimension; None for the format's own.
        kv_algo: format of the KV cache for which the checkpoint was calibrated.
        excluded: names or patterns of modules that are not quantised.
        certain: whether all modules that aren't excluded are quantised; False if the checkpoint selects them in a way that isn't supported
            here.
        source: the file or key it was read from.
    """

    algo: str
    group_size: int | None = None
    kv_algo: str | None = None
    excluded: tuple[str, ...] = ()
    certain: bool = True
    source: str = ""

    @property
    def known(self) -> bool:
        """Whether the size of this format's elements is known."""
        return self.algo in _FORMATS

    @property
    def bytes_per_element(self) -> float:
        """Bytes of one weight, scales included.

        Raises:
            KeyError: the format isn't `known`.
        """
        if self.group_size is not None and self.algo in GROUPED:
            return 0.5 + 2 / self.group_size
        return _FORMATS[self.algo][0]

    @property
    def block(self) -> int:
        """Number of elements that share a scale; 1 if whole tensors or rows do."""
        return self.group_size or (_FORMATS[self.algo][1] if self.known else 1)

    def excludes(self, module: str) -> bool:
        """Return whether the module at ``layers.<n>.<path>`` (or ``lm_head``) is not quantised."""
        parts = module.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        names, loose, globs = self._patterns
        if any(prefix in names for prefix in prefixes):
            return True
        dotted = f".{module}."
        return any(f".{part}." in dotted for part in loose) or any(
            glob.fullmatch(prefix) for glob in globs for prefix in prefixes
        )

    @cached_property
    def _patterns(self) -> tuple[frozenset[str], tuple[str, ...], tuple[re.Pattern[str], ...]]:
        import re

        names: set[str] = set()
        loose: list[str] = []
        globs: list[re.Pattern[str]] = []
        for pattern in self.excluded:
            if pattern.startswith("re:"):
                try:
                    globs.append(re.compile(r"(?:.*\.)?" + re.sub(_ABOVE_LAYERS, "", pattern[3:], count=1)))
                except (re.error, OverflowError, RecursionError):
                    continue
                continue
            start = pattern.find("layers.")
            if any(part in pattern[: max(start, 0)] for part in _OTHER_PARTS):
                continue
            tail = pattern[start:] if start >= 0 else pattern
            if "*" in tail or "?" in tail:
                escaped = re.escape(tail).replace(r"\*", ".*").replace(r"\?", ".")
                globs.append(re.compile(escaped if start >= 0 else rf"(?:.*\.)?{escaped}"))
            elif start >= 0:
                names.add(tail)
            else:
                loose.append(tail)
        return frozenset(names), tuple(loose), tuple(globs)


def read_quantisation(config: Reader, quant_file: Reader | None) -> Quantisation | None:
    """Read a checkpoint's quantisation, ModelOpt's own file first, as TensorRT-LLM does.

    Args:
        config: the whole ``config.json``.
        quant_file: ``hf_quant_config.json``, if it exists.

    Raises:
        ConfigFileError: one of the values has the wrong type.
    """
    if quant_file is not None and quant_file.has("quantization"):
        return _modelopt(quant_file.section("quantization"), "hf_quant_config.json")
    for holder in (config, *(config.section(key) for key in ("text_config", "llm_config") if config.has(key))):
        if holder.has("quantization_config"):
            return _hugging_face(holder.section("quantization_config"))
    return None


def _modelopt(section: Reader, source: str) -> Quantisation | None:
    algo = section.text("quant_algo")
    kv_algo = section.text("kv_cache_quant_algo")
    if algo is None and kv_algo is None:
        return None
    return Quantisation(
        algo=_canonical(algo or "none"),
        group_size=section.size("group_size"),
        kv_algo=kv_algo,
        excluded=_names(section, "exclude_modules"),
        certain=algo is not None and algo.upper() != MIXED_PRECISION,
        source=source,
    )


# ModelOpt's name for block-scaled FP8 weights
_ALIASES = {"FP8_PB_WO": FP8_BLOCK_SCALES}
_PLAIN_METHODS = {"fbgemm_fp8": FP8_ROWWISE, "mxfp4": MXFP4, "awq": W4A16_AWQ, "gptq": W4A16_GPTQ}


def _hugging_face(section: Reader) -> Quantisation | None:
    source = "quantization_config"
    excluded = tuple(
        name
        for key in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
        for name in _names(section, key)
    )
    kv_scheme = section.values.get("kv_cache_scheme")
    kv_algo = kv_scheme if isinstance(kv_scheme, str) else FP8 if isinstance(kv_scheme, dict) else None
    algo = section.text("quant_algo")
    method = section.text("quant_method")
    if algo is not None:
        return Quantisation(
            _canonical(algo), section.size("group_size"), kv_algo, excluded, algo.upper() != MIXED_PRECISION, source
        )
    if method is None:
        return None
    if method == "fp8":
        block = section.sizes("weight_block_size")
        if block:
            return Quantisation(FP8_BLOCK_SCALES, block[-1], kv_algo, excluded, True, source)
        return Quantisation(FP8, None, kv_algo, excluded, True, source)
    if method == "compressed-tensors":
        found, size, certain = _compressed_tensors(section.values.get("config_groups"))
        return Quantisation(found, size, kv_algo, excluded, certain, source)
    group_size = (
        section.size("group_size") if method in ("awq", "gptq") and section.values.get("group_size") != -1 else None
    )
    return Quantisation(
        _PLAIN_METHODS.get(method, method), group_size, kv_algo, excluded, method in _PLAIN_METHODS, source
    )


def _compressed_tensors(groups: object) -> tuple[str, int | None, bool]:
    """Name the format of compressed-tensors' first group: several groups, or targets other than all linear layers, are not certain."""
    if not isinstance(groups, dict) or not groups:
        return "compressed-tensors", None, False
    first = next(iter(groups.values()))
    weights: Any = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return "compressed-tensors", None, False
    certain = len(groups) == 1 and first.get("targets", ["Linear"]) == ["Linear"]
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    size = weights.get("group_size")
    size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
    if (bits, kind) == (8, "float"):
        named = {"block": FP8_BLOCK_SCALES, "channel": FP8_ROWWISE}.get(str(strategy), FP8)
        return named, 128 if named == FP8_BLOCK_SCALES else None, certain
    if (bits, kind) == (4, "float"):
        return (MXFP4 if size == 32 else NVFP4), size, certain
    if (bits, kind) == (4, "int"):
        return W4A16_AWQ, size, certain
    return "compressed-tensors", size, False


def _canonical(algo: str) -> str:
    return _ALIASES.get(algo.upper(), algo.upper())


def _names(section: Reader, key: str) -> tuple[str, ...]:
    value = section.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise section.bad(key, "a list of module names")
    return tuple(value)
