# SPDX-License-Identifier: Apache-2.0
"""How far the ranks are, in words and as facts; and when to say so. Pure.

With an engine of ours a rank says when its own part of a phase is done. What TensorRT-LLM does on a rank is not to be seen: there, what is
known is how many bytes each rank's process has read, and the one that has read the least is named. Weights that are mapped count only as far
as they came from a disk for this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.common.log_record import Fact
    from dynamo_mpi.common.phases import PhaseProgress

MOST_SECONDS = 300.0
WATCHED = ("hardware_check", "load", "warmup", "register")
"""Phases of a world that may take long enough for somebody to ask."""


def intervals(first: float, most: float = MOST_SECONDS) -> Iterator[float]:
    """Yield the seconds between one line and the next, twice as many each time, up to ``most``."""
    seconds = max(first, 0.1)
    while True:
        yield min(seconds, most)
        seconds = min(2 * seconds, most)


def describe(progress: PhaseProgress, *, parts_seen: bool) -> str:
    """Say it in one line.

    Args:
        progress: what is known.
        parts_seen: ranks tell when their own part is done.
    """
    if progress.slowest_rank is None:
        return f"{progress.phase}: nothing is known of the ranks yet"
    where = f"{progress.slowest_host} (rank {progress.slowest_rank})"
    if parts_seen:
        text = f"{progress.phase} {progress.done}/{progress.ranks} ranks, slowest {where} {progress.seconds:.0f} s"
        return f"{text}, {_share(progress)}" if progress.read is not None and progress.ranks > progress.done else text
    text = f"{progress.phase} {progress.seconds:.0f} s"
    if progress.read is None or progress.slowest_read is None:
        return f"{text}; how far each rank is dynamo.trtllm doesn't tell"
    return f"{text}, {progress.ranks} ranks have read {size(progress.read)}, the least {where}: {size(progress.slowest_read)}"


def facts(progress: PhaseProgress) -> dict[str, Fact]:
    """Return the same as fields of a line of JSON; what isn't known is left out."""
    known: dict[str, Fact] = {
        "phase": progress.phase,
        "done": progress.done,
        "ranks": progress.ranks,
        "slowest_rank": progress.slowest_rank,
        "slowest_host": progress.slowest_host,
        "seconds": round(progress.seconds, 1),
        "read_bytes": progress.read,
        "slowest_read_bytes": progress.slowest_read,
    }
    return {name: fact for name, fact in known.items() if fact is not None}


def size(count: int) -> str:
    """Write a number of bytes, in GB of 10^9 as disks and file systems have them."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _share(progress: PhaseProgress) -> str:
    return f"{size(progress.slowest_read or 0)} of {size(progress.read or 0)} read"
