# SPDX-License-Identifier: Apache-2.0
"""What a key of the engine config accepts, in one line: ``int >0 ?``, ``=CPP|PYTHON|auto``, ``[int >0]+ ?``.

===================  ==========================================================================
``int float bool``   as pydantic converts them (`common.coerce`); ``int!`` is never converted
``str map any``      text, a mapping, anything; ``section`` is a mapping with keys of its own
``=A|B``, ``~A|B``   one of these texts; with ``~`` in any case
``[SPEC]``           a list; ``+`` behind it, or behind ``str``, means not empty
``>0 >=0 <1 <=1``    bounds of a number
``SPEC / SPEC``      either
``?`` at the end     null is accepted
===================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dynamo_mpi.common.coerce import as_bool, as_float, as_int
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.layout.format import listed

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
