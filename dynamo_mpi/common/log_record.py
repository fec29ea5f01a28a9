# SPDX-License-Identifier: Apache-2.0
"""One log line, as text or as JSON with the keys of Dynamo's own lines, and its level, by `DYN_LOG` as Dynamo reads it. Pure."""

from __future__ import annotations

import time
from enum import IntEnum

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

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


Fact = str | int | float | bool | None


class Line(NamedTuple):
    """A log record.

    Args:
        time: seconds since 1970.
        level: the severity.
        rank: the rank that logs it; None for a node's agent.
        host: the rank's or agent's host.
        text: the message; may have several lines.
        facts: fields by name, for JSON lines only.
    """

    time: float
    level: Level
    rank: int | None
    host: str
    text: str
    facts: Mapping[str, Fact]

    def as_text(self) -> str:
        """Return the line for stderr, without time and level."""
        speaker = "" if self.rank is None else f"rank {self.rank} on "
        return f"{TARGET}: {speaker}{self.host}: {self.text}\n"

    def as_logged(self) -> str:
        """Return the line for log files."""
        return f"{_stamp(self.time)} {self.level.name:>5} {self.as_text()}"

    def as_json(self) -> str:
        """Return the line as a JSON object; facts are fields beside Dynamo's, as in Dynamo's own lines."""
        import json  # imported here: it opens a dozen files, which only JSON lines need

        document: dict[str, Fact] = {
            "time": _stamp(self.time),
            "level": self.level.name,
            "target": TARGET,
            "message": self.text,
            **({} if self.rank is None else {"rank": self.rank}),
            "host": self.host,
        }
        return (
            json.dumps(
                document | {name: fact for name, fact in self.facts.items() if name not in document},
                separators=(",", ":"),
            )
            + "\n"
        )


def _stamp(seconds: float) -> str:
    whole = int(seconds // 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1e6):06d}Z"
