# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is quantised: the formats of its weights, and which module has which.

Module names here begin at ``layers.<n>``, or are ``lm_head``: what stands above differs between checkpoint, transformers and engine.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import re
    from collections.abc import Hashable, Iterable, Iterator

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
# where a pattern may begin below
_ABOVE = r"(?:.*\.)?"
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

    def key_of(self, layer: int) -> Hashable:
        """Return a key that is equal for layers whose modules are named alike, exclusions and formats: most have few such kinds."""
        patterns = tuple(pattern.key_of(layer) for pattern, _ in self._formats[1])
        return self._excluded.key_of(layer), self._formats_by_layer.get(str(layer)), patterns

    @cached_property
    def _formats_by_layer(self) -> dict[str, frozenset[tuple[str, WeightFormat]]]:
        found: dict[str, set[tuple[str, WeightFormat]]] = {}
        for name, form in self._formats[0].items():
            _, number, rest = (*name.split(".", 2), "", "")[:3]
            found.setdefault(number, set()).add((rest, form))
        return {number: frozenset(rests) for number, rests in found.items()}

    @cached_property
    def _excluded(self) -> _Patterns:
        return _Patterns(self.excluded)

    @cached_property
    def _formats(self) -> tuple[dict[str, WeightFormat], tuple[tuple[_Patterns, WeightFormat], ...]]:
        """The formats of modules by name, and those of patterns in order: one `_Patterns` for all that follow each other with one format."""
        exact: dict[str, WeightFormat] = {}
        patterns: list[tuple[str, WeightFormat]] = []
        for name, form in self.modules:
            start = name.find("layers.")
            if name.startswith("re:") or "*" in name or "?" in name:
                patterns.append((name, form))
            elif not any(part in name[: max(start, 0)] for part in _OTHER_PARTS):
                exact.setdefault(name[start:] if start >= 0 else name, form)
        runs = groupby(patterns, key=lambda pattern: pattern[1])
        return exact, tuple((_Patterns(name for name, _ in run), form) for form, run in runs)


def _prefixes(module: str) -> Iterator[str]:
    """Yield a module's name and those of the modules above it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


class _Patterns:
    """Names and patterns of modules. Checkpoints list hundreds, most of one layer each: those are looked up by its number."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._loose: list[str] = []
        self._anywhere: list[re.Pattern[str]] = []
        # by a layer's number: names, and with a star what names begin with
        self._of_layer: dict[str, set[str]] = {}
        self._beginnings: list[str] = []
        # whether another pattern may distinguish layers
        self._by_number = False
        for pattern in patterns:
            start = pattern.find("layers.")
            tail = pattern[start:] if start >= 0 else pattern
            if pattern.startswith("re:"):
                self._add_regex(pattern[3:])
            elif any(part in pattern[: max(start, 0)] for part in _OTHER_PARTS):
                continue
            elif "*" in tail[:-1] or "?" in tail or (start < 0 and "*" in tail):
                self._add_glob(tail, start >= 0)
            elif start < 0:
                self._loose.append(tail)
            else:
                number, _, rest = tail[len("layers.") :].partition(".")
                if number.isdecimal():
                    names = self._of_layer.setdefault(number, set())
                    names.add(rest or "*")
                    if rest.endswith(".*"):  # a.* stands for a itself too
                        names.add(rest[:-2])
                elif tail.endswith("*"):  # layers.1*
                    self._beginnings.append(tail[:-1])
                else:
                    self._loose.append(tail)

        self._by_number |= any(letter.isdigit() for name in self._loose for letter in name)

    def matches(self, module: str) -> bool:
        """Return whether a module or one above it has such a name."""
        if self._of_layer and module.startswith("layers."):
            number, _, path = module[len("layers.") :].partition(".")
            for rest in self._of_layer.get(number, ()):
                if path.startswith(rest[:-1]) if rest.endswith("*") else path == rest or path.startswith(f"{rest}."):
                    return True
        if any(map(module.startswith, self._beginnings)):
            return True
        if any(glob.fullmatch(prefix) for glob in self._anywhere for prefix in _prefixes(module)):
            return True
        dotted = f".{module}."
        return any(f".{part}." in dotted for part in self._loose)

    def key_of(self, layer: int) -> Hashable:
        """Return a key that is equal for layers to which the same patterns apply."""
        name = f"layers.{layer}"
        begins = tuple(map(name.startswith, self._beginnings))
        return frozenset(self._of_layer.get(str(layer), ())), begins, self._by_number and layer

    def _add_regex(self, pattern: str) -> None:
        import re

        plain = pattern.replace(".*", "").replace("\\.", "")
        self._by_number |= any(letter in "0123456789.?+*[{\\" for letter in plain)
        tail = re.sub(_ABOVE_LAYERS, "", pattern, count=1)
        # what stands above `layers.<n>` was cut off from names
        above = "" if tail.startswith(".*") else _ABOVE
        try:
            self._anywhere.append(re.compile(above + tail))
        except (re.error, OverflowError, RecursionError):
            return

    def _add_glob(self, tail: str, in_layers: bool) -> None:
        import re

        self._by_number |= any(letter.isdigit() or letter == "?" for letter in tail)

        def regex(glob: str) -> str:
            return "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in glob)

        above = "" if in_layers or tail.startswith("*") else _ABOVE
        # a.* stands for a itself too
        whole = regex(tail[:-2]) + r"(?:\..*)?" if tail.endswith(".*") else regex(tail)
        self._anywhere.append(re.compile(above + whole))
