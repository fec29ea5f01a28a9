# SPDX-License-Identifier: Apache-2.0
"""Failures as node agents see them, and hand them to each other: which came first, and the report about them. Pure, but for the clock."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.failure import DetectedBy, Failure, describe_consequences, root_cause

if TYPE_CHECKING:
    from collections.abc import Sequence


MOST_TEXT = 4000
"""Characters of a failure's text between node agents."""
_MOST_REPORT = 8000
_MOST_LATER = 8


class Seen(NamedTuple):
    """A failure, and the node of its rank."""

    failure: Failure
    host: str


class Report(NamedTuple):
    """What is written of failures.

    Args:
        failure: the first cause.
        host: where that happened.
        text: for people.
        later: what followed from it.
        speaker: the rank in whose name it is written.
        speaker_host: its node.
    """

    failure: Failure
    host: str
    text: str
    later: tuple[Seen, ...]
    speaker: int
    speaker_host: str


def sorted_seen(seen: Sequence[Seen]) -> list[Seen]:
    """Return failures in the order in which they happened, each rank's first one only."""
    found: dict[int, Seen] = {}
    for each in sorted(seen, key=lambda one: one.failure.at):
        found.setdefault(each.failure.rank, each)
    return list(found.values())


def describe_seen(seen: Sequence[Seen], phase: str) -> Report:
    """Write the report about failures, in the name of the rank that failed first.

    Args:
        seen: at least one, in the order in which they happened.
        phase: what the world was doing; empty where that isn't known.
    """
    failures = [each.failure for each in seen]
    hosts = {each.failure.rank: each.host for each in seen}
    first = root_cause(failures)

    def name(ranks: Sequence[int]) -> str:
        return " and ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)

    parts = [f"error in {phase or first.phase}: {first.text}", describe_consequences(first, failures, name)]
    later = tuple(each for each in seen if each.failure is not first)
    host = hosts[first.rank]
    return Report(first, host, "\n".join(filter(None, parts)), later, first.rank, host)


def pack_seen(seen: Seen) -> str:
    """Encode one, in a line, for another process: maybe of another host, so the time becomes an age. A long text is clipped."""
    clipped = seen.failure._replace(text=clip(seen.failure.text, MOST_TEXT))
    return json.dumps({**_plain(clipped), "host": seen.host})


def read_seen(text: str) -> Seen | None:
    """Decode what `pack_seen` made; None where it isn't that."""
    try:
        content = json.loads(text)
        return Seen(_failure(content), str(content["host"]))
    except (ValueError, KeyError, TypeError):
        return None


def clip(text: str, most: int) -> str:
    """Return a text, or of one that has more characters its beginning and, mostly, its end: that of a traceback says the most."""
    return text if len(text) <= most else f"{text[: most // 4]}\n[…]\n{text[-(most - most // 4) :]}"


def pack_report(report: Report) -> str:
    """Encode a report, in a line, with as much of it as a connection takes at once."""
    content = {
        "failure": _plain(report.failure._replace(text=clip(report.failure.text, _MOST_REPORT))),
        "host": report.host,
        "text": clip(report.text, _MOST_REPORT),
        "later": [pack_seen(each) for each in report.later[:_MOST_LATER]],
        "speaker": report.speaker,
        "speaker_host": report.speaker_host,
    }
    return json.dumps(content)


def read_report(text: str) -> Report | None:
    """Decode what `pack_report` made; None where it isn't that."""
    try:
        content = json.loads(text)
        later = tuple(seen for each in content["later"] if (seen := read_seen(each)) is not None)
        host, said = str(content["host"]), str(content["text"])
        return Report(
            _failure(content["failure"]), host, said, later, int(content["speaker"]), str(content["speaker_host"])
        )
    except (ValueError, KeyError, TypeError):
        return None


def _plain(failure: Failure) -> dict[str, Any]:
    age = max(0.0, time.monotonic() - failure.at) if failure.at else 0.0
    return {**failure._asdict(), "cause": int(failure.cause), "at": age}


def _failure(content: dict[str, Any]) -> Failure:
    return Failure(
        int(content["rank"]),
        int(content["exit_code"]),
        str(content["text"]),
        DetectedBy(content["cause"]),
        str(content["phase"]),
        time.monotonic() - float(content["at"]),
        int(content["sequence"]),
    )
