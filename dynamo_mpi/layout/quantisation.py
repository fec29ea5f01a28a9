# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is quantised: the formats of its weights, and which module has which.

Module names here begin at ``layers.<n>``, or are ``lm_head``: what stands above differs between checkpoint, transformers and engine.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dynamo_mpi.common.frozen import dataclass

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator

# names as TensorRT-LLM's QuantAlgo has them
FP8 = "FP8"
FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
FP8_ROWWISE = "FP8_ROWWISE"
MXFP8 = "MXFP8"
NVFP4 = "NVFP4"
W4A16_NVFP4 = "W4A16_NVFP4"
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
    MXFP8: (1.0 + 1 / 32, 32),
    NVFP4: (0.5 + 1 / NVFP4_BLOCK, NVFP4_BLOCK),
    W4A16_NVFP4: (0.5 + 1 / NVFP4_BLOCK, NVFP4_BLOCK),
    **dict.fromkeys(MICROSCALED, (0.5 + 1 / 32, 32)),
    **dict.fromkeys(GROUPED, (0.5 + 2 / 128, 128)),
    "W8A16": (1.0, 1),
    "W8A8_SQ_PER_CHANNEL": (1.0, 1),
    "INT8": (1.0, 1),
}

# parts of a model whose layers have numbers of their own
_OTHER_PARTS = ("vision", "visual", "image", "audio", "speech", "mtp")
# the prefix of `layers.<n>` in a regular expression, with escaped dots or not
_ABOVE_LAYERS = r"\^?(?:(?:language_model|model|backbone)\\?\.)*"


@dataclass(frozen=True)
class WeightFormat:
    """A number format of weights.

    Args:
        algo: TensorRT-LLM's name of it, or the checkpoint's own if TensorRT-LLM's isn't known.
        group_size: elements that share a scale, along the reduced dimension; None for the format's own.
    """

    algo: str
    group_size: int | None = None

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


@dataclass(frozen=True)
class Quantisation:
    """A checkpoint's quantisation.

    Args:
        algo: the format of quantised modules, ``MIXED_PRECISION`` for several, ``NONE`` if only the KV cache was calibrated.
        group_size: elements that share a scale, along the reduced dimension; None for the format's own.
        kv_algo: format of the KV cache for which the checkpoint was calibrated.
        excluded: names or patterns of modules that are not quantised.
        certain: whether all modules that aren't excluded are quantised; False if the checkpoint selects them in a way that isn't supported
            here.
        source: the file or key it was read from.
        modules: for ``MIXED_PRECISION``, each quantised module's name or pattern, and its format.
        base: format of the modules that `modules` leaves out (DeepSeek-V4: a checkpoint that was in FP8 before); None for the model's dtype.
        covers_head: whether the LM head is quantised too, unless it is excluded.
    """

    algo: str
    group_size: int | None = None
    kv_algo: str | None = None
    excluded: tuple[str, ...] = ()
    certain: bool = True
    source: str = ""
    modules: tuple[tuple[str, WeightFormat], ...] = ()
    base: WeightFormat | None = None
    covers_head: bool = False

    @property
    def format(self) -> WeightFormat:
        """The format of quantised modules, if there is only one."""
        return WeightFormat(self.algo, self.group_size)

    def excludes(self, module: str) -> bool:
        """Return whether a module isn't quantised: its name, or that of a module above it, matches as a whole; ``*`` and ``?`` stand for
        anything, ``re:`` begins a regular expression. (TensorRT-LLM, ``QuantConfig.is_module_excluded_from_quantization``)"""
        return self._excluded.matches(module)

    def format_of(self, modules: Iterable[str]) -> WeightFormat | None:
        """Return the format of a part of a layer.

        Args:
            modules: the names that it may have; it is excluded if one of them is.

        Returns:
            The format; None if it isn't quantised.
        """
        names = tuple(modules)
        if any(map(self.excludes, names)):
            return self.base
        if not self.modules:
            return None if self.algo == "NONE" else self.format
        exact, patterns = self._formats
        for name in names:
            for prefix in _prefixes(name):
                if prefix in exact:
                    return exact[prefix]
            for pattern, form in patterns:
                if pattern.matches(name):
                    return form
        return self.base

    @cached_property
    def _excluded(self) -> _Patterns:
        return _Patterns(self.excluded)

    @cached_property
    def _formats(self) -> tuple[dict[str, WeightFormat], tuple[tuple[_Patterns, WeightFormat], ...]]:
        exact: dict[str, WeightFormat] = {}
        patterns: list[tuple[_Patterns, WeightFormat]] = []
        for name, form in self.modules:
            start = name.find("layers.")
            if name.startswith("re:") or "*" in name or "?" in name:
                patterns.append((_Patterns((name,)), form))
            elif not any(part in name[: max(start, 0)] for part in _OTHER_PARTS):
                exact.setdefault(name[start:] if start >= 0 else name, form)
        return exact, tuple(patterns)


def _prefixes(module: str) -> Iterator[str]:
    """Yield a module's name and those of the modules above it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _regex(glob: str) -> str:
    from re import escape

    return "".join({"*": ".*", "?": "."}.get(letter) or escape(letter) for letter in glob)


class _Patterns:
    """Names and patterns of modules; those that begin with a layer's number are looked up by it, as checkpoints list hundreds."""

    def __init__(self, patterns: Iterable[str]) -> None:
        import re

        self._names: set[str] = set()
        self._loose: list[str] = []
        self._anywhere: list[re.Pattern[str]] = []
        self._in_layer: dict[str, list[re.Pattern[str]]] = {}
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    self._anywhere.append(re.compile(r"(?:.*\.)?" + re.sub(_ABOVE_LAYERS, "", pattern[3:], count=1)))
                except (re.error, OverflowError, RecursionError):
                    continue
                continue
            start = pattern.find("layers.")
            if any(part in pattern[: max(start, 0)] for part in _OTHER_PARTS):
                continue
            tail = pattern[start:] if start >= 0 else pattern
            if "*" not in tail and "?" not in tail:
                (self._names.add if start >= 0 else self._loose.append)(tail)
                continue
            # a.* stands for a itself too
            glob = re.compile(
                ("" if start >= 0 else r"(?:.*\.)?")
                + (_regex(tail[:-2]) + r"(?:\..*)?" if tail.endswith(".*") else _regex(tail))
            )
            number = tail.split(".")[1] if start >= 0 else ""
            (self._in_layer.setdefault(number, []) if number.isdecimal() else self._anywhere).append(glob)

    def matches(self, module: str) -> bool:
        """Return whether a module or one above it has such a name."""
        parts = module.split(".")
        globs = [*self._anywhere, *self._in_layer.get(parts[1] if len(parts) > 1 else "", ())]
        for prefix in _prefixes(module):
            if prefix in self._names or any(glob.fullmatch(prefix) for glob in globs):
                return True
        dotted = f".{module}."
        return any(f".{part}." in dotted for part in self._loose)
