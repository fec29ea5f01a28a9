# SPDX-License-Identifier: Apache-2.0
"""Writes a value as YAML on one line, so that a user can paste it.

YAML's own writer isn't used: it takes a while to import, breaks lines, and has no limit, though anchors make small files large.
"""

from __future__ import annotations

from collections.abc import Mapping

LONGEST = 2000
"""Characters of a value that is written in full."""

_CUT = "..."
_DEEPEST = 8
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")
_NOT_TEXT = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})
_NO_NUMBERS = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}


class _AsIs(str):
    """Text that is written without quotes."""


def yaml_line(value: object, limit: int) -> str:
    """Write a value as YAML, on one line.

    Args:
        value: mappings, lists, text, numbers; anything else is written as text.
        limit: characters after which the rest is left out, roughly; what lies deeper than eight levels is left out too.
    """
    return _put(value, [limit], _DEEPEST)


def whole(value: object) -> object:
    """Return the value itself if it can be written in full, else text that stands for it."""
    left = [LONGEST]
    _put(value, left, _DEEPEST)
    return value if left[0] > 0 else _AsIs("<the value that is there>")


def quoted(text: str) -> str:
    """Write text in double quotes, in ASCII."""
    # not at the top: hardly ever needed
    import json

    # JSON has no escapes beyond U+FFFF, and lets DEL through
    return "".join(map(_escaped, json.dumps(text, ensure_ascii=False)))


def shortened(text: str, limit: int) -> str:
    """Cut text that is longer than ``limit``, and show that it was."""
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def _put(value: object, left: list[int], depth: int) -> str:
    """Write a value; ``left`` counts down the characters that may still follow."""
    if left[0] <= 0 or depth == 0:
        left[0] = 0
        return _CUT
    left[0] -= 2
    if isinstance(value, Mapping | list | tuple):
        opening, closing = "{}" if isinstance(value, Mapping) else "[]"
        parts: list[str] = []
        for item in value:
            part = _put(item, left, depth - 1)
            parts.append(f"{part}: {_put(value[item], left, depth - 1)}" if isinstance(value, Mapping) else part)
            if left[0] <= 0:
                break
        return opening + ", ".join(parts) + closing
    text = _scalar(value)
    left[0] -= len(text)
    return text


def _scalar(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _NO_NUMBERS.get(str(value)) or _with_point(str(value))
    if isinstance(value, int):
        return str(value) if value.bit_length() < 1024 else "<a very large number>"
    if isinstance(value, _AsIs):
        return str(value)
    if isinstance(value, str):
        start = value[: 2 * LONGEST]
        plain = (start[:1].isalpha() or start[:1] in ("/", "_")) and set(start) <= _PLAIN
        return start if plain and start.lower() not in _NOT_TEXT else quoted(start)
    return quoted(str(value)[: 2 * LONGEST])


def _with_point(number: str) -> str:
    """YAML takes 1e-05 for text, and 1.0e-05 for a number."""
    digits, exponent, power = number.partition("e")
    return f"{digits}.0e{power}" if exponent and "." not in digits else number


def _escaped(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
