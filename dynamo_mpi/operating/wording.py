# SPDX-License-Identifier: Apache-2.0
"""Times, nodes and progress as an operator reads them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.operating.views import Failure, Progress, Worker

_NODES = 4


def spell_seconds(seconds: float) -> str:
    """Return a time that passed: ``40 s``, ``12 min``, ``5.2 h``, ``3 d``."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def spell_since(then: float | None, now: float) -> str:
    """Return how long ago something was; ``-`` where it isn't known."""
    return "-" if then is None else spell_seconds(now - then)


def spell_nodes(names: Sequence[str]) -> str:
    """Return the names of nodes, of many the first, the last, and their number."""
    if not names:
        return "-"
    return ",".join(names) if len(names) <= _NODES else f"{names[0]} … {names[-1]} ({len(names)})"


def spell_progress(progress: Progress | None) -> str:
    """Return ``11/16, slowest n03``, or ``37.6 GB read, slowest n03`` where ranks don't tell when they are through; nothing where nothing is
    known."""
    if progress is None:
        return ""
    slowest = progress.slowest_host or ("" if progress.slowest_rank is None else f"rank {progress.slowest_rank}")
    is_over = progress.done is not None and progress.done >= progress.ranks
    late = f", slowest {slowest}" if slowest and not is_over else ""
    if progress.done is not None:
        return f"{progress.done}/{progress.ranks}{late}"
    return "" if progress.read is None else f"{progress.read / 1e9:.1f} GB read{late}"


def spell_position(worker: Worker, now: float) -> str:
    """Return where a worker stands: ``load 3/6, slowest n3, 40 s``."""
    parts = [f"{worker.phase} {spell_progress(worker.progress)}".rstrip()]
    if (since := worker.phase_since or worker.started) is not None:
        parts.append(spell_seconds(now - since))
    return ", ".join(parts)


def spell_failure(failure: Failure, name: str, now: float) -> str:
    """Return a failure on one line."""
    where = f", rank {failure.rank}" if failure.rank is not None else ""
    where += f" on {failure.host}" if failure.host else ""
    phase = f" in {failure.phase}" if failure.phase else ""
    again = f", start {failure.attempt}" if failure.attempt > 1 else ""
    when = spell_seconds(now - failure.time)
    return f"{name}{again}: exit code {failure.exit_code}{phase}{where}, {when} ago: {failure.error or 'no words'}"
