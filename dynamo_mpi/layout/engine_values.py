# SPDX-License-Identifier: Apache-2.0
"""Reads the table of values that TensorRT-LLM's arguments accept, by key and by version: kinds, bounds and closed sets.

The table (``engine_values.json``) has what was read in several versions of ``llmapi/llm_args.py``. Between two of them each release and
candidate may have been the one that changed: it accepts what either side accepts, because the check must not refuse what works. What a key
accepts is one line there, such as ``int >0 ?``, ``=CPP|PYTHON|auto``, ``[int >0]+ ?``:

===================  ==========================================================================
``int float bool``   as pydantic converts them (`engine_reader`); ``int!`` is never converted
``str map any``      text, a mapping, anything; ``section`` is a mapping with keys of its own
``=A|B``, ``~A|B``   one of these texts; with ``~`` in any case
``[SPEC]``           a list; ``+`` behind it, or behind ``str``, means not empty
``>0 >=0 <1 <=1``    bounds of a number
``SPEC / SPEC``      either
``?`` at the end     null is accepted
===================  ==========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_reader import as_bool, as_float, as_int
from dynamo_mpi.layout.format import listed
from dynamo_mpi.layout.key_conflicts import read_conflict
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.layout.trtllm_version import TrtllmVersion

_BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_NOUNS = {
    "int": "a whole number",
    "int!": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "map": "a mapping",
    "section": "a mapping",
}


@dataclass(frozen=True)
class Choice:
    """One alternative.

    Args:
        kind: ``int``, ``str``, ``list`` and so on; ``value`` for a closed set.
        bounds: of a number: the comparison and the limit.
        values: the closed set.
        any_case: whether the set's texts may be written in any case.
        item: of a list: what each item accepts.
        filled: of a list or a text: whether it must not be empty.
    """

    kind: str
    bounds: tuple[tuple[str, float], ...] = ()
    values: tuple[str, ...] = ()
    any_case: bool = False
    item: ValueSpec | None = None
    filled: bool = False

    def accepts(self, value: object) -> bool:
        """Return whether the engine accepts the value."""
        if self.kind == "value":
            return isinstance(value, str) and (
                value in self.values or (self.any_case and value.lower() in [known.lower() for known in self.values])
            )
        if self.kind == "list":
            return (
                isinstance(value, list | tuple | set)
                and not (self.filled and not value)
                and (self.item is None or all(map(self.item.accepts, value)))
            )
        if self.kind == "str":
            return isinstance(value, str | bytes) and not (self.filled and not value)
        if self.kind in ("map", "section"):
            return isinstance(value, Mapping)
        if self.kind == "bool":
            return as_bool(value) is not None
        if self.kind == "any":
            return True
        if self.kind == "int!":
            number: float | None = value if isinstance(value, int) and not isinstance(value, bool) else None
        else:
            number = as_int(value) if self.kind == "int" else as_float(value)
        return number is not None and all(_holds(number, sign, limit) for sign, limit in self.bounds)

    def __str__(self) -> str:
        if self.kind == "value":
            return f"one of {listed(self.values)}" if len(self.values) > 1 else self.values[0]
        if self.kind == "list":
            filled = " that isn't empty" if self.filled else ""
            item = self.item.choices[0] if self.item is not None else None
            of = f", each {item}" if item is not None and item.kind != "any" else ""
            return f"a list{filled}{of}"
        text = _NOUNS.get(self.kind, "any value") + (" that isn't empty" if self.filled else "")
        limits = [f"{_BOUNDS[sign]} {limit:g}" for sign, limit in self.bounds]
        return f"{text} {' and '.join(limits)}" if limits else text


@dataclass(frozen=True)
class ValueSpec:
    """What a key accepts.

    Args:
        choices: the alternatives.
        null: whether null is accepted.
    """

    choices: tuple[Choice, ...]
    null: bool = False

    def accepts(self, value: object) -> bool:
        """Return whether the engine accepts the value."""
        if value is None:
            return self.null or any(choice.kind == "any" for choice in self.choices)
        return any(choice.accepts(value) for choice in self.choices)


def describe(specs: tuple[ValueSpec, ...]) -> str:
    """Describe what at least one of the specs accepts, for a finding; closed sets are joined."""
    values = dict.fromkeys(value for spec in specs for choice in spec.choices for value in choice.values)
    texts = [f"one of {listed(values)}" if len(values) > 1 else next(iter(values))] if values else []
    texts += dict.fromkeys(str(choice) for spec in specs for choice in spec.choices if not choice.values)
    return ", or ".join(texts) + (", or null" if any(spec.null for spec in specs) else "")


@cache
def parse_spec(text: str) -> ValueSpec:
    """Read a spec.

    Raises:
        ValueError: it isn't one.
    """
    text = text.strip()
    null = text.endswith("?")
    parts = text.removesuffix("?").split(" / ")
    return ValueSpec(tuple(_choice(part.strip()) for part in parts), null)


def _choice(text: str) -> Choice:
    if text[:1] in ("=", "~"):
        return Choice("value", values=tuple(text[1:].split("|")), any_case=text[0] == "~")
    filled = text.endswith("+")
    text = text.removesuffix("+")
    if text.startswith("["):
        return Choice("list", item=parse_spec(text[1:-1]), filled=filled)
    kind, *bounds = text.split()
    if kind not in _NOUNS and kind != "any":
        raise ValueError(f"{text!r} is no kind of value")
    return Choice(kind, tuple(map(_bound, bounds)), filled=filled)


def _bound(text: str) -> tuple[str, float]:
    sign = next((sign for sign in _BOUNDS if text.startswith(sign)), "")
    return sign, float(text.removeprefix(sign))


def _holds(number: float, sign: str, limit: float) -> bool:
    return {">": number > limit, ">=": number >= limit, "<": number < limit, "<=": number <= limit}[sign]


@dataclass(frozen=True)
class Source:
    """One version of the engine's arguments that was read.

    Args:
        first: the first release that it can be of.
        last: the last one.
        partial: whether only some sections of it were read.
    """

    first: TrtllmVersion
    last: TrtllmVersion
    partial: bool = False


class EngineValues:
    """The table.

    Args:
        data: as ``engine_values.json`` has it.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.names: tuple[str, ...] = tuple(row["name"] for row in data["sources"])
        self.sources = tuple(
            Source(parse_trtllm_version(row["from"]), parse_trtllm_version(row["to"]), row.get("partial", False))
            for row in data["sources"]
        )
        self.variants: Mapping[str, str] = data["variants"]
        self.newest = next(source.last for source in reversed(self.sources) if not source.partial)
        self._values: Mapping[str, Mapping[str, str | Mapping[str, str]]] = data["values"]
        self._code: Mapping[str, str | Mapping[str, str]] = data["code"]
        self.conflicts = tuple(map(read_conflict, data["key_conflicts"]))
        above = {path.rpartition(".")[0] for path in self._code if "." in path}
        self.sections = frozenset({place for place in self._values if "=" not in place} - {"variants"} | above)

    def around(self, version: TrtllmVersion | None) -> range | None:
        """Return the sources between which a version is, by their index; None if it is older than all of them."""
        if version is None:
            return range(len(self.sources))
        for index, source in enumerate(self.sources):
            if source.first == version == source.last:
                return range(index, index + 1)
        if version < self.sources[0].first:
            return None
        below = [index for index, source in enumerate(self.sources) if source.last <= version]
        above = [index for index, source in enumerate(self.sources) if source.first >= version]
        return range(below[-1] if below else 0, (above[0] if above else len(self.sources) - 1) + 1)

    def specs(self, section: str, key: str, variant: str | None, around: range) -> tuple[ValueSpec, ...]:
        """Return what a key accepts, one alternative for each of the sources; empty if that isn't known.

        Args:
            section: dotted path of the key's section; ``""`` is the top level.
            key: its name.
            variant: value of the section's discriminator, if it has one.
            around: indexes of the sources.
        """
        found = self._code.get(f"{section}.{key}" if section else key)
        if found is None and variant is not None:
            found = self._values.get(f"{section}={variant}", {}).get(key)
        if found is None:
            found = self._values.get(section, {}).get(key)
        return () if found is None else tuple(map(parse_spec, dict.fromkeys(self._between(found, around))))

    def keys_of_variant(self, section: str, variant: str, around: range) -> frozenset[str] | None:
        """Return the keys that a section has for one value of its discriminator; None if that isn't known."""
        lists = self._values["variants"]
        own = self._between(lists.get(f"{section}={variant}", ""), around)
        return frozenset(" ".join((*own, *self._between(lists[f"{section}=*"], around))).split()) if own else None

    def _between(self, found: str | Mapping[str, str], around: Sequence[int]) -> list[str]:
        """Return the texts that hold in the sources ``around``; an empty text means that the source has nothing."""
        if isinstance(found, str):
            return [found] if found else []
        current, texts = "", []
        for index, name in enumerate(self.names):
            current = found.get(name, current)
            if index in around:
                texts.append(current)
        return [text for text in texts if text]


@cache
def engine_values() -> EngineValues:
    """Return the table."""
    import json

    with open(os.path.join(os.path.dirname(__file__), "engine_values.json"), encoding="utf-8") as table:
        return EngineValues(json.load(table))
