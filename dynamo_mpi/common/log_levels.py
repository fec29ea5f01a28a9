# SPDX-License-Identifier: Apache-2.0
"""Log levels, and `DYN_LOG` as Dynamo reads it, with one difference. Pure."""

from __future__ import annotations

from enum import IntEnum

TARGET = "dynamo_mpi"
_OFF = 100
_DIGITS = {"0": _OFF, "1": 40, "2": 30, "3": 20, "4": 10, "5": 5}
_TRUTHS = frozenset(("1", "true", "yes", "on"))


class Level(IntEnum):
    """How much a line matters."""

    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40


def least_level(filters: str) -> int:
    """Return the level below which our lines are left out.

    ``DYN_LOG`` is a list of ``LEVEL`` and ``TARGET=LEVEL``, of which the longest target counts that ours begins with. A level alone can only
    make us say more: it is how Dynamo's own chatter is turned down, and what we say at ``info`` is the few lines of a worker's life that
    people and launchers wait for. ``dynamo_mpi=warn`` turns those off. Errors are said in any case.

    Args:
        filters: the value of ``DYN_LOG``; empty for none. What of it can't be read counts for nothing.
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
    """Read a switch of Dynamo's, as ``DYN_LOGGING_JSONL``."""
    return value.strip().lower() in _TRUTHS


def _number(name: str) -> int | None:
    name = name.strip().upper()
    if name in Level.__members__:
        return int(Level[name])
    return {"OFF": _OFF, "TRACE": 5}.get(name, _DIGITS.get(name))
