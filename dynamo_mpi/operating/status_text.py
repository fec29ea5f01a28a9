# SPDX-License-Identifier: Apache-2.0
"""A snapshot as a table and some lines. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.operating.untrusted import shown
from dynamo_mpi.operating.wording import spell_failure, spell_nodes, spell_progress, spell_seconds, spell_since

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.operating.place import Expected
    from dynamo_mpi.operating.snapshot import Snapshot
    from dynamo_mpi.operating.views import Worker

_HEADS = ("model", "worker", "layout", "nodes", "phase", "for", "up", "requests", "start", "progress")
_MOST_WARNINGS = 8
_LONGEST_CELL, _LONGEST_LINE = 48, 240


def describe(snapshot: Snapshot, width: int = _LONGEST_LINE) -> str:
    """Return it as text.

    Args:
        snapshot: what to show.
        width: characters on a line that the table may take: its widest columns are cut until it does.
    """
    rows = [_row(snapshot, worker) for worker in snapshot.workers]
    rows += [_missing_row(worker) for worker in snapshot.missing]
    lines = _table([_HEADS, *rows], width) if rows else ["no worker is there"]
    lines += _events(snapshot)
    return "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines)


def _row(snapshot: Snapshot, worker: Worker) -> tuple[str, ...]:
    now = snapshot.time
    return (
        worker.model,
        snapshot.name_of(worker),
        "-" if worker.layout is None else str(worker.layout),
        spell_nodes(worker.hosts),
        worker.phase,
        spell_since(worker.phase_since, now),
        spell_since(worker.started, now),
        "-" if worker.in_flight is None else str(worker.in_flight),
        str(worker.attempt),
        spell_progress(worker.progress),
    )


def _missing_row(worker: Expected) -> tuple[str, ...]:
    return ("-", worker.name, "-", spell_nodes(worker.nodes), "not there", "-", "-", "-", "-", "")


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    widths = [min(_LONGEST_CELL, max(map(len, column))) for column in zip(*rows, strict=True)]
    heads = [len(head) for head in _HEADS]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max(range(len(widths)), key=lambda index: widths[index] - heads[index])
        if widths[longest] <= heads[longest]:
            break
        widths[longest] -= 1
    return ["  ".join(_cell(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"


def _events(snapshot: Snapshot) -> list[str]:
    place, now, lines = snapshot.place, snapshot.time, []
    if snapshot.failures:
        still = snapshot.open_failures
        lines.append("failures of the last hour:")
        for failure in snapshot.failures:
            after = "" if failure in still else " [started again]"
            lines.append(f"  {spell_failure(failure, snapshot.name_of(failure), now)}{after}")
    if snapshot.services:
        states = (
            f"{s.name} {'up' if s.is_up else 'DOWN'} at {s.url}{s.note and f' ({s.note})'}" for s in snapshot.services
        )
        lines.append(f"services: {', '.join(states)}")
    if place.is_orphaned:
        lines.append(f"warning: its launcher was killed; dynamo-mpi down --run-dir {place.run_dir} clears up")
    if place.ended is not None:
        ago = spell_seconds(now - place.ended.time)
        report = shown(" ".join(place.ended.report.split()), _LONGEST_LINE)
        lines.append(f"the last deployment ended {ago} ago with exit code {place.ended.exit_code}: {report}")
    warnings = [f"warning: {text}" for text in snapshot.warnings]
    if len(warnings) > _MOST_WARNINGS:
        warnings[_MOST_WARNINGS - 1 :] = [f"warning: and {len(warnings) - _MOST_WARNINGS + 1} more"]
    return lines + warnings
