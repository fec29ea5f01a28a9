# SPDX-License-Identifier: Apache-2.0
"""Formats times, nodes and progress for operators. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.discovery.failure_records import FailureRecord
    from dynamo_mpi.discovery.records import Progress, WorkerRecord

_NODES = 4


def format_seconds(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``5.2 h``, ``3 d``."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def format_since(then: float | None, now: float) -> str:
    """Format the time since a moment; ``-`` if it isn't known."""
    return format_seconds(now - then) if then else "-"


def format_nodes(names: Sequence[str]) -> str:
    """Format the names of nodes; of many, the first, the last, and their number."""
    if not names:
        return "-"
    return ",".join(names) if len(names) <= _NODES else f"{names[0]} … {names[-1]} ({len(names)})"


def format_progress(progress: Progress | None) -> str:
    """Return ``11/16, slowest n03``, or ``37.6 GB read, slowest n03`` if ranks don't report when they are done; empty if it isn't known."""
    if progress is None:
        return ""
    slowest = progress.slowest_host or ("" if progress.slowest_rank is None else f"rank {progress.slowest_rank}")
    is_over = progress.done is not None and progress.done >= progress.ranks
    late = f", slowest {slowest}" if slowest and not is_over else ""
    if progress.done is not None:
        return f"{progress.done}/{progress.ranks}{late}"
    return "" if progress.read is None else f"{progress.read / 1e9:.1f} GB read{late}"


def format_position(worker: WorkerRecord, now: float) -> str:
    """Format a worker's phase and progress: ``load 3/6, slowest n3, 40 s``."""
    parts = [f"{worker.phase} {format_progress(worker.progress)}".rstrip()]
    if since := worker.phase_since or worker.started:
        parts.append(format_seconds(now - since))
    return ", ".join(parts)


def format_failure(failure: FailureRecord, name: str, now: float) -> str:
    """Return a failure on one line."""
    where = f", rank {failure.rank}" if failure.rank >= 0 else ""
    where += f" on {failure.host}" if failure.host else ""
    phase = f" in {failure.phase}" if failure.phase else ""
    again = f", start {failure.attempt}" if failure.attempt > 1 else ""
    when = format_seconds(now - failure.time)
    return f"{name}{again}: exit code {failure.exit_code}{phase}{where}, {when} ago: {failure.error or 'no error text'}"
