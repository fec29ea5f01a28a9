# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as JSON, and out of JSON that another process wrote. Pure: one writer, and one reader, which checks types and sanitizes text.

Strict, for data that programs act on: the first problem is an error. Tolerant, for data that is only displayed: a missing or invalid field
gets its default, or else its type's zero value, and the problem is listed. No value can break a terminal, a table or a calculation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dataclasses import Field

    from _typeshed import DataclassInstance

T = TypeVar("T")
_MAX_CHARACTERS, _MAX_ITEMS, _MAX_NUMBER = 4096, 4096, 1e15
_LIST = "tuple[str, ...]"
_ZEROS: dict[str, object] = {"str": "", "int": 0, "float": 0.0, "bool": False, _LIST: ()}
_NAMES = {"str": "a text", "int": "an integer", "float": "a number", "bool": "true or false", _LIST: "a list of texts"}


def write_object(record: DataclassInstance, schema: int) -> bytes:
    """Encode a record as the JSON object that `parse_object` and `read_fields` read."""
    # here and below: with `common.frozen`, rank 0 has no need of it before the preflight's result
    from dataclasses import asdict

    return json.dumps({"schema": schema, **asdict(record)}, separators=(",", ":")).encode()


def parse_object(data: bytes, schema: int) -> dict[str, Any]:
    """Parse a JSON object that has a schema version.

    Raises:
        ValueError: it isn't a JSON object, or has another schema.
    """
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    found = content.get("schema")
    if type(found) is not int or found != schema:
        raise ValueError(f"of schema {sanitize(repr(found), 40)}, not {schema}")
    return content


def read_fields(
    kind: type[T], data: object, problems: list[str] | None = None, needed: tuple[str, ...] = (), **given: Any
) -> T:
    """Create ``kind``, a dataclass of plain fields, from a JSON object. Unknown fields, of newer writers, are ignored.

    Args:
        kind: the dataclass; its module must have ``from __future__ import annotations``.
        data: the JSON object.
        problems: None for strict; a list for tolerant, to which one line per problem is added.
        needed: fields that must exist and not be empty, even for a tolerant reader.
        given: values of fields that were read before.

    Raises:
        ValueError: ``data`` is not an object, or a required field is missing or invalid.
    """
    from dataclasses import MISSING, fields

    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} is not an object")
    tolerant, values = problems is not None, dict(given)
    for field in fields(kind):  # type: ignore[arg-type]  # a TypeVar can't say "a dataclass" before Python 3.13
        name, value = field.name, data.get(field.name)
        if name in values:
            continue
        if name in needed and value in (None, ""):
            raise ValueError(f"{name} is missing")
        if value is None and (tolerant or name not in data) and field.default is not MISSING:
            values[name] = field.default
            continue
        try:
            values[name] = _read(name, str(field.type), value, tolerant)
        except ValueError as error:
            if problems is None or name in needed:
                raise
            if value is not None:
                problems.append(str(error))
            values[name] = _fallback(field)
    return kind(**values)


def _read(name: str, wanted: str, value: object, tolerant: bool) -> object:
    base, *rest = wanted.split(" | ")
    if value is None and rest:
        return None
    # writers use -1 for an unknown rank
    if not _is_a(base, value, -1 if name == "rank" else 0):
        raise ValueError(f"{name} is {'missing' if value is None else f'not {_NAMES[base]}'}")
    if base == "float" and isinstance(value, int):
        return float(value)
    if base == _LIST and isinstance(value, list):
        return tuple(_text(name, item, tolerant) for item in value[:_MAX_ITEMS])
    return _text(name, value, tolerant) if isinstance(value, str) else value


def _is_a(base: str, value: object, minimum: int) -> bool:
    if base == "str":
        return isinstance(value, str)
    if base == _LIST:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    # bool is a subclass of int in Python, but not in JSON
    if base == "bool" or isinstance(value, bool):
        return base == "bool" and isinstance(value, bool)
    if base == "int":
        return isinstance(value, int) and minimum <= value <= _MAX_NUMBER
    return isinstance(value, (int, float)) and abs(value) <= _MAX_NUMBER and math.isfinite(value)


def _text(name: str, text: str, tolerant: bool) -> str:
    if tolerant:
        return sanitize(text)
    if not text.isprintable() or len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{name} is no text that can be displayed")
    return text


def _fallback(field: Field[Any]) -> object:
    from dataclasses import MISSING

    if field.default is not MISSING:
        return field.default
    return None if str(field.type).endswith("| None") else _ZEROS[str(field.type)]
