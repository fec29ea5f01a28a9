# SPDX-License-Identifier: Apache-2.0
"""Reads the engine config's values as the engine itself does: pydantic's lax mode takes ``"8"``, ``8.0`` and ``true`` for whole numbers,
``"yes"`` and 1 for switches. A config that it takes isn't refused here."""

from __future__ import annotations

from dynamo_mpi.common.config_reader import LARGEST, MAX_SIZE, ConfigReader
from dynamo_mpi.common.light_typing import Any

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


ANY = -MAX_SIZE
"""The lowest minimum: a number that the engine doesn't bound."""


class EngineReader(ConfigReader):
    """A `ConfigReader` that converts numbers and switches; a missing key stays None."""

    def size(self, *keys: str, minimum: int = 1, maximum: int = MAX_SIZE) -> int | None:
        """Return the value of the first of ``keys`` that has one, a whole number; None if none has."""
        key = next((key for key in keys if self.has(key)), None)
        if key is None:
            return None
        value = as_int(self.values[key])
        if value is None or not minimum <= value <= maximum:
            raise self.bad_size(key, minimum, maximum)
        return value

    def positive(self, key: str) -> int | None:
        """Return a number of which zero and less mean the same as none."""
        value = self.size(key, minimum=ANY)
        return value if value is not None and value > 0 else None

    def number(self, key: str) -> float | None:
        """Return a number; rules check its range."""
        if not self.has(key):
            return None
        value = as_float(self.values[key])
        if value is None or not abs(value) < LARGEST:
            raise self.bad(key, "a number")
        return value

    def switch(self, key: str) -> bool | None:
        """Return true, false, or None if it isn't set."""
        if not self.has(key):
            return None
        value = as_bool(self.values[key])
        if value is None:
            raise self.bad(key, "true or false")
        return value

    def sizes(self, key: str, minimum: int = 1) -> tuple[int, ...] | None:
        """Return a list of whole numbers."""
        if not self.has(key):
            return None
        value: Any = self.values[key]
        numbers = [as_int(item) for item in value] if isinstance(value, list) else [None]
        found = [number for number in numbers if number is not None and minimum <= number <= MAX_SIZE]
        if len(found) < len(numbers):
            raise self.bad(key, f"a list of whole numbers of at least {minimum}")
        return tuple(found)

    def section(self, key: str) -> EngineReader:
        """Return a nested mapping; an empty one if it is missing."""
        inner = super().section(key)
        return EngineReader(inner.values, inner.path, inner.prefix)
