# SPDX-License-Identifier: Apache-2.0
"""The members of JSON documents, one on a line: path, types, example. Pure.

    workers[].in_flight: int | null = 3     an integer or null; 3 in the first sample that has one, which shows the unit
    error?.exit_code: int = 70              ``error`` is missing from some samples
    completions.<key>.tokens: int = 8       the names of ``completions`` are data
    memory: object | {}                     may be empty; its members are all there where it isn't
    spans[][0]: str = "load"                a list whose places differ in type

Texts with blanks are prose: they are shown as ``str`` alone, so that a reworded message changes no shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_TYPES = {str: "str", int: "int", float: "float", bool: "bool", type(None): "null"}


@dataclass
class _Member:
    types: set[str] = field(default_factory=set)
    example: str = ""
    seen: int = 0
    objects: int = 0


def members_of(
    samples: Sequence[Any],
    *,
    maps: Collection[str] = (),
    varying: Collection[str] = (),
    opaque: Collection[str] = (),
    examples: bool = True,
) -> str:
    """Return the members of JSON documents of one kind.

    Args:
        samples: documents; what is null or missing in some of them is marked so.
        maps: paths of objects whose names are data.
        varying: last names of members whose value is another in each run, so that no example can be shown.
        opaque: paths of members that are not looked into.
        examples: whether to show any. An estimate that gets better changes no contract.
    """
    found: dict[str, _Member] = {}
    for sample in samples:
        _visit("", json.loads(json.dumps(sample)), found, maps, opaque)
    lines = {}
    for path, member in found.items():
        is_shown = examples and path.rpartition(".")[2].partition("[")[0] not in varying
        example = f" = {member.example}" if is_shown and member.example else ""
        types = " | ".join(sorted(member.types, key=lambda name: (name in ("{}", "null"), name)))
        if path:
            marked = _marked(path, found)
            lines[marked] = f"{marked}: {types}{example}\n"
    return "".join(lines[path] for path in sorted(lines))


def _visit(path: str, value: Any, found: dict[str, _Member], maps: Collection[str], opaque: Collection[str]) -> None:
    member = found.setdefault(path, _Member())
    member.seen += 1
    if path in opaque and value is not None:
        member.types.add("object")
    elif isinstance(value, dict):
        member.types.add("object" if value else "{}")
        # an empty object makes no member of the others optional
        member.objects += bool(value)
        for name, inner in value.items():
            _visit(f"{path}.{'<key>' if path in maps else name}".lstrip("."), inner, found, maps, opaque)
    elif isinstance(value, list):
        member.types.add("list")
        for place, inner in _places(value):
            _visit(f"{path}[{place}]", inner, found, maps, opaque)
    else:
        member.types.add(_TYPES[type(value)])
        member.example = member.example or _example(value)


def _places(values: list[Any]) -> Iterator[tuple[str, Any]]:
    """Number the places of a list that differ in type: it is a record, and no list of equal things."""
    types = {type(value) for value in values if value is not None}
    is_record = len({kind for kind in types if kind in _TYPES}) > 1
    return ((str(place) if is_record else "", value) for place, value in enumerate(values))


def _marked(path: str, found: dict[str, _Member]) -> str:
    """Put a question mark behind each name on the way that some samples don't have."""
    marked, before = [], ""
    for part in path.split("."):
        name, bracket, places = part.partition("[")
        is_optional = name != "<key>" and found[f"{before}.{name}".lstrip(".")].seen < found[before].objects
        marked.append(f"{name}{'?' if is_optional else ''}{bracket}{places}")
        before = f"{before}.{part}".lstrip(".")
    return ".".join(marked)


def _example(value: Any) -> str:
    if value is None or (isinstance(value, str) and (not value or " " in value or len(value) > 100)):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    return json.dumps(value, ensure_ascii=False)
