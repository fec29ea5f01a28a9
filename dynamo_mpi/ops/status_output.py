# SPDX-License-Identifier: Apache-2.0
"""The status of a deployment as text for people, and as JSON for programs. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.deploy.excluded import for_next_job
from dynamo_mpi.ops.readiness import (
    DEPARTED,
    GIVEN_UP,
    format_failure,
    format_nodes,
    format_progress,
    format_seconds,
    format_since,
    missing_items,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.discovery.failure_records import StoredFailure
    from dynamo_mpi.discovery.records import StoredRecord
    from dynamo_mpi.ops.deployment import ExpectedWorker, NodeNote
    from dynamo_mpi.ops.status import DeploymentStatus

_HEADS = ("model", "worker", "layout", "nodes", "phase", "for", "up", "requests", "start", "progress")
_MOST_WARNINGS = 8
_LONGEST_CELL, _LONGEST_LINE = 48, 240


def describe(status: DeploymentStatus, width: int = _LONGEST_LINE) -> str:
    """Return the status as text.

    Args:
        status: the status.
        width: the table's maximal width in characters: its widest columns are cut until it fits.
    """
    rows = [_row(status, worker) for worker in status.workers]
    rows += [_absent_row(worker, "not there", "-") for worker in status.missing]
    rows += [_absent_row(w, DEPARTED, format_since(w.departed, status.time)) for w in status.departed]
    rows += [_absent_row(worker, GIVEN_UP, "-") for worker in status.given_up]
    lines = _table([_HEADS, *rows], width) if rows else ["no worker is there"]
    lines += _events(status)
    return "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines)


def _row(status: DeploymentStatus, worker: StoredRecord) -> tuple[str, ...]:
    now, record = status.time, worker.record
    return (
        record.model,
        status.name_of(worker),
        str(record.layout) if record.layout.is_known else "-",
        format_nodes(record.hosts),
        record.phase,
        format_since(record.phase_since, now),
        format_since(record.started, now),
        "-" if record.in_flight is None else str(record.in_flight),
        str(record.attempt),
        format_progress(record.progress),
    )


def _absent_row(worker: ExpectedWorker, phase: str, since: str) -> tuple[str, ...]:
    return ("-", worker.name, "-", format_nodes(worker.nodes), phase, since, "-", "-", "-", "")


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


def _events(status: DeploymentStatus) -> list[str]:
    deployment, now, lines = status.deployment, status.time, []
    if status.failures:
        still = status.open_failures
        lines.append("failures of the last hour:")
        for failure in status.failures:
            after = "" if failure in still else " [started again]"
            lines.append(f"  {format_failure(failure.record, status.name_of(failure), now)}{after}")
    lines += _nodes(status)
    if status.services:
        states = (
            f"{s.name} {'up' if s.is_up else 'DOWN'} at {s.url}{s.note and f' ({s.note})'}" for s in status.services
        )
        lines.append(f"services: {', '.join(states)}")
    if deployment.launcher_is_dead:
        lines.append(
            f"warning: its launcher was killed; dynamo-mpi down --run-dir {shell_word(deployment.run_dir)} clears up"
        )
    if deployment.end is not None:
        ago = format_seconds(now - deployment.end.time)
        report = sanitize(deployment.end.problem, _LONGEST_LINE)
        lines.append(f"the last deployment ended {ago} ago with exit code {deployment.end.exit_code}: {report}")
    warnings = [f"warning: {text}" for text in status.warnings]
    if len(warnings) > _MOST_WARNINGS:
        warnings[_MOST_WARNINGS - 1 :] = [f"warning: and {len(warnings) - _MOST_WARNINGS + 1} more"]
    return lines + warnings


def _nodes(status: DeploymentStatus) -> list[str]:
    """Return a line each about spare nodes, nodes that are left out or drained, and workers that were given up."""
    launch, lines = status.deployment.launch, []
    if launch is None:
        return []
    if launch.spares:
        states = (f"{s.node} {s.state}{s.reason and f' ({s.reason})'}" for s in launch.spares)
        lines.append(f"spare nodes: {', '.join(states)}")
    if launch.excluded:
        reasons = (f"{e.node} ({e.reason})" for e in launch.excluded)
        hostfile = None if launch.job_id else "the hostfile"
        lines.append(f"left out: {'; '.join(reasons)}; {for_next_job([e.node for e in launch.excluded], hostfile)}")
    lines += [
        f"warning: {d.node} is drained: {d.reason}; dynamo-mpi replace {d.node} moves its worker"
        for d in launch.drained
    ]
    lines += [f"warning: {w.name} is given up: {w.given_up}" for w in status.given_up]
    return lines


SCHEMA = 1
# for partners, not for operators
_HIDDEN = ("contract", "probe", "stage", "caches")


def as_json(status: DeploymentStatus) -> dict[str, Any]:
    """Return the status as plain data."""
    deployment, still = status.deployment, status.open_failures
    launch, end = deployment.launch, deployment.end
    return {
        "schema": SCHEMA,
        "ok": status.is_well,
        "ready": not missing_items(status),
        "time": status.time,
        "run_dir": None if deployment.run_dir is None else str(deployment.run_dir),
        "workers": [_worker(status, worker) for worker in status.workers],
        "missing": [{"name": w.name, "role": w.role, "nodes": list(w.nodes)} for w in status.missing],
        "departed": [
            {"name": w.name, "role": w.role, "nodes": list(w.nodes), "time": w.departed} for w in status.departed
        ],
        "given_up": [
            {"name": w.name, "role": w.role, "nodes": list(w.nodes), "reason": w.given_up} for w in status.given_up
        ],
        "restarts": [] if launch is None else [{"name": w.name, "count": w.restarts} for w in launch.workers],
        "max_restarts": None if launch is None else launch.max_restarts,
        "spares": [] if launch is None else [_note(s, "state", "reason") for s in launch.spares],
        "excluded": [] if launch is None else [_note(e, "reason", "time", "worker") for e in launch.excluded],
        "drained": [] if launch is None else [_note(d, "reason") for d in launch.drained],
        "failures": [_failure(status, failure, failure not in still) for failure in status.failures],
        "services": [{"name": s.name, "url": s.url, "up": s.is_up, "note": s.note} for s in status.services],
        "launcher": None
        if launch is None
        else {
            "host": launch.host,
            "pid": launch.pid,
            "job": launch.job_id or None,
            "gone": deployment.launcher_is_dead,
        },
        "ended": None if end is None else asdict(end),
        "warnings": list(status.warnings),
    }


def error_as_json(error: DynamoMpiError) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"ok": False, "error": error.plain()}


def _worker(status: DeploymentStatus, worker: StoredRecord) -> dict[str, Any]:
    record, content = worker.record, asdict(worker.record)
    for name in _HIDDEN:
        content.pop(name, None)
    # values that are missing in the record
    for name in ("started", "engine", "endpoint", "dynamo_mpi"):
        content[name] = content[name] or None
    del content["layout"]["gpus_per_node"]
    layout = {**content["layout"], "text": str(record.layout)} if record.layout.is_known else None
    return {"key": sanitize(worker.key), **content, "layout": layout, "name": status.name_of(worker)}


def _note(note: NodeNote, *names: str) -> dict[str, Any]:
    return {name: getattr(note, name) for name in ("node", *names)}


def _failure(status: DeploymentStatus, failure: StoredFailure, followed: bool) -> dict[str, Any]:
    content = asdict(failure.record)
    del content["endpoint"]
    content |= {"key": sanitize(failure.key), "name": status.name_of(failure), "followed": followed}
    return {**content, "rank": failure.record.rank if failure.record.rank >= 0 else None}
