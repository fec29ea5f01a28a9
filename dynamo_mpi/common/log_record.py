# SPDX-License-Identifier: Apache-2.0
"""One log line, as text or as JSON with the keys of Dynamo's own lines. Pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.log_levels import TARGET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.log_levels import Level

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
