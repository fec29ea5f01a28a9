# SPDX-License-Identifier: Apache-2.0
"""Dataclasses out of JSON that somebody else wrote: strict about what is known, silent about what is new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
_LIST = "tuple[str, ...]"
_MOST_CHARACTERS = 4096


def read_object(data: bytes, known: int) -> dict[str, Any]:
    """Read a JSON object that says its schema.

    Args:
        data: as it was written, here or in another version.
        known: the schema that is read here.

    Raises:
        ValueError: it isn't one, or of another schema.
    """
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    schema = content.get("schema")
    if type(schema) is not int or schema != known:
        raise ValueError(f"of schema {schema!r:.40}, not {known}")
    return content


def read_fields(kind: type[T], data: object, **given: Any) -> T:
    """Build ``kind``, a dataclass of plain fields, from a JSON object. Names that it doesn't have are left out: a newer writer's.

    Args:
        kind: what to build; its module has ``from __future__ import annotations``.
        data: the object.
        given: fields that were read before.

    Raises:
        ValueError: something is missing, or of another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} is {type(data).__name__}, not an object")
    values = dict(given)
    for field in fields(kind):  # type: ignore[arg-type]  # a TypeVar can't say "a dataclass" before Python 3.13
        if field.name in values:
            continue
        if field.name not in data and field.default is not MISSING:
            continue
        values[field.name] = _read(field.name, str(field.type), data.get(field.name))
    return kind(**values)


def _read(name: str, wanted: str, value: object) -> object:
    if wanted == _LIST:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {type(value).__name__}, not a list")
        return tuple(_read(name, "str", item) for item in value)
    kinds = wanted.split(" | ")
    if value is None and "None" in kinds:
        return None
    allowed = _KINDS[kinds[0]]
    # True is an int to Python, and to nobody else
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"{name} is {type(value).__name__}, not {wanted}")
    # it will stand in somebody's log
    if isinstance(value, str) and not (value.isprintable() and len(value) <= _MOST_CHARACTERS):
        raise ValueError(f"{name} is no text to be shown")
    return value
