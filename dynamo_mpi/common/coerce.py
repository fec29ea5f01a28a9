# SPDX-License-Identifier: Apache-2.0
"""Converts values as TensorRT-LLM's arguments do: pydantic's lax mode takes ``"8"``, ``8.0`` and ``true`` for whole numbers, ``"yes"``
and 1 for switches. A check that is stricter would refuse configs that work."""

from __future__ import annotations

_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})
_LONGEST = 1000


def as_int(value: object) -> int | None:
    """Return a whole number; None if the value isn't taken for one."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str) or len(value) > _LONGEST:
        return None
    whole, _, fraction = value.strip().partition(".")
    if fraction.strip("0") or (not fraction and "." in value):
        return None
    try:
        return int(whole)
    except ValueError:
        return None


def as_float(value: object) -> float | None:
    """Return a number; None if the value isn't taken for one."""
    if not isinstance(value, int | float | str) or (isinstance(value, str) and len(value) > _LONGEST):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def as_bool(value: object) -> bool | None:
    """Return a switch; None if the value isn't taken for one."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    text = value.lower() if isinstance(value, str) and len(value) <= 5 else ""
    return True if text in _TRUE else False if text in _FALSE else None
