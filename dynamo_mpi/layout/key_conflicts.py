# SPDX-License-Identifier: Apache-2.0
"""Keys of the engine config that TensorRT-LLM's validators refuse together, or without each other; the rows are in ``engine_values.json``.

===============  ===============================================================
``PATH``         it is set: not null, false, zero or empty; ``!PATH``: it isn't
``PATH=A|B``     it is one of these texts, in any case; ``!PATH=A``: it isn't
``PATH>N``       it is a number above N
``PATH:``        it is given as a mapping, even an empty one
===============  ===============================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import Any
from dynamo_mpi.layout.engine_reader import as_float
from dynamo_mpi.layout.engine_yaml import short_line

_SHOWN = 60
_SIGNS = "=>:"


@dataclass(frozen=True)
class Condition:
    """One condition of a row.

    Args:
        path: dotted path of the key.
        sign: ``=``, ``>``, ``:`` or nothing.
        operand: what follows the sign.
        negated: whether the opposite is meant.
    """

    path: str
    sign: str = ""
    operand: str = ""
    negated: bool = False

    def holds(self, config: Mapping[str, object]) -> bool:
        """Return whether the engine config fulfils it."""
        return self._is_met(_value(config, self.path)) is not self.negated

    def shown(self, config: Mapping[str, object]) -> str:
        """Return what the engine config has there, for a finding."""
        value = _value(config, self.path)
        return f"no {self.path}" if value is None else f"{self.path}: {short_line(value, _SHOWN)}"

    def _is_met(self, value: object) -> bool:
        if self.sign == ":":
            return isinstance(value, Mapping)
        if self.sign == ">":
            number = as_float(value)
            return number is not None and number > float(self.operand)
        if self.sign == "=":
            wanted = self.operand.lower().split("|")
            return isinstance(value, str | int | float) and str(value)[:_SHOWN].lower() in wanted
        return bool(value)


@dataclass(frozen=True)
class KeyConflict:
    """One row.

    Args:
        conditions: all of them must hold.
        fix: what to write instead.
        message: what is wrong; by default that the keys can't be combined.
        since: the version from which the engine refuses it; empty if as far back as the keys are known.
    """

    conditions: tuple[Condition, ...]
    fix: str
    message: str = ""
    since: str = ""

    def holds(self, config: Mapping[str, object]) -> bool:
        """Return whether the engine config is of this kind."""
        return all(condition.holds(config) for condition in self.conditions)

    def __str__(self) -> str:
        return self.message or f"{' and '.join(condition.path for condition in self.conditions)} can't be combined"


def read_conflict(row: Mapping[str, Any]) -> KeyConflict:
    """Read a row of the table."""
    conditions = tuple(map(_condition, row["set"]))
    return KeyConflict(conditions, row["fix"], row.get("message", ""), row.get("since", ""))


def _condition(text: str) -> Condition:
    path = text.removeprefix("!")
    sign = next((character for character in path if character in _SIGNS), "")
    path, _, operand = path.partition(sign) if sign else (path, "", "")
    return Condition(path, sign, operand, negated=text.startswith("!"))


def _value(config: Mapping[str, object], path: str) -> object:
    there: object = config
    for part in path.split("."):
        if not isinstance(there, Mapping):
            return None
        there = there.get(part)
    return there
