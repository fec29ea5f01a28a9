# SPDX-License-Identifier: Apache-2.0
"""Fields of JSON that anybody who may write to etcd has written: nothing of it may break a terminal, a table or a number. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

NAME_CHARACTERS = 256
_LARGEST = 1e15


def parse(data: bytes, schema: int) -> dict[str, Any]:
    """Return the object.

    Raises:
        ValueError: it is none, or of another schema.
    """
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    found = content.get("schema")
    if type(found) is not int or found != schema:
        raise ValueError(f"of schema {shown(repr(found), 40)}, not {schema}")
    return content


def shown(text: str, most: int = NAME_CHARACTERS) -> str:
    """Return ``text`` as a terminal may have it, on one line: what isn't printable as an escape, and not longer than ``most``."""
    cut = text[: most + 1]
    safe = cut if cut.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in cut)
    return safe if len(safe) <= most else safe[: most - 1] + "…"


def shown_lines(text: str, most: int) -> str:
    """Do the same for a text of several lines."""
    cut = text[: most + 1]
    lines = "\n".join(shown(line, most) for line in cut.split("\n"))
    return lines if len(lines) <= most else lines[: most - 1] + "…"


class Fields:
    """An object's fields, each of the type that is wanted or told in `odd`.

    Args:
        content: the object.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self.odd: list[str] = []

    def text(self, name: str, most: int = NAME_CHARACTERS) -> str | None:
        """Return a text that can be shown, or None."""
        value = self._content.get(name)
        if value is None or isinstance(value, str):
            return None if value is None else shown(value, most)
        self._is_odd(name, "text")
        return None

    def lines(self, name: str, most: int) -> str | None:
        """Return a text of several lines, or None."""
        value = self._content.get(name)
        if value is None or isinstance(value, str):
            return None if value is None else shown_lines(value, most)
        self._is_odd(name, "text")
        return None

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return a list of texts, at most so many."""
        value = self._content.get(name)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(shown(item) for item in value[:most])
        if value is not None:
            self._is_odd(name, "list of texts")
        return ()

    def number(self, name: str) -> float | None:
        """Return a number within reason, or None."""
        value = self._content.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_sane(value):
            return float(value)
        if value is not None:
            self._is_odd(name, "number")
        return None

    def count(self, name: str) -> int | None:
        """Return a whole number within reason, not below 0, or None."""
        value = self._content.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
            return value
        if value is not None:
            self._is_odd(name, "count")
        return None

    def rank(self, name: str) -> int | None:
        """Return a rank, or None; -1 is how a writer says that it doesn't know."""
        return None if self._content.get(name) == -1 else self.count(name)

    def switch(self, name: str) -> bool:
        """Return whether it is true."""
        return self._content.get(name) is True

    def fields(self, name: str) -> Fields | None:
        """Return an object's fields, whose odd ones count here too, or None."""
        value = self._content.get(name)
        if isinstance(value, dict):
            inner = Fields(value)
            inner.odd = self.odd
            return inner
        if value is not None:
            self._is_odd(name, "object")
        return None

    def needed(self, *names: str) -> dict[str, str]:
        """Return texts that have to be there.

        Raises:
            ValueError: one isn't.
        """
        found = {name: self.text(name) for name in names}
        for name, text in found.items():
            if not text:
                raise ValueError(f"without {name}")
        return {name: str(text) for name, text in found.items()}

    def _is_odd(self, name: str, wanted: str) -> None:
        self.odd.append(f"{name} is no {wanted}")


def _is_sane(value: float) -> bool:
    # an integer may be too large for a float
    return -_LARGEST <= value <= _LARGEST and math.isfinite(value)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
