# SPDX-License-Identifier: Apache-2.0
"""Log levels, and `DYN_LOG` as Dynamo reads it, with one difference. Pure."""

from __future__ import annotations

from enum import IntEnum

TARGET = "dynamo_mpi"
_OFF = 100
_DIGITS = {"0": _OFF, "1": 40, "2": 30, "3": 20, "4": 10, "5": 5}
_TRUTHS = frozenset(("1", "true", "yes", "on"))


class Level(IntEnum):
    """The severity of a line."""

    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40


def least_level(filters: str) -> int:
    """Return the level below which this package's lines are omitted.

    ``DYN_LOG`` is a list of ``LEVEL`` and ``TARGET=LEVEL``; the longest target that is a prefix of ours applies. A level without a target
    can only lower our level: users set it to silence Dynamo's own lines, while our few ``info`` lines are those that users and launchers
    wait for. ``dynamo_mpi=warn`` omits them. Errors are never omitted.

    Args:
        filters: the value of ``DYN_LOG``; empty for none. Invalid parts are ignored.
    """
    least, longest = int(Level.INFO), -1
    for directive in filters.split(","):
        target, equals, name = directive.strip().rpartition("=")
        level = _number(name)
        if level is None:
            continue
        if not equals:
            if longest < 0:
                least = min(least, level)
        elif target.startswith(TARGET) and TARGET.startswith(target) and len(target) >= longest:
            least, longest = level, len(target)
    return min(least, int(Level.ERROR))


def is_true(value: str) -> bool:
    """Parse one of Dynamo's boolean variables, such as ``DYN_LOGGING_JSONL``."""
    return value.strip().lower() in _TRUTHS


def _number(name: str) -> int | None:
    name = name.strip().upper()
    if name in Level.__members__:
        return int(Level[name])
    return {"OFF": _OFF, "TRACE": 5}.get(name, _DIGITS.get(name))
