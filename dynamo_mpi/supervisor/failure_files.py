# SPDX-License-Identifier: Apache-2.0
"""Failures as JSON files, one for each rank that failed, for who looks after many workers. Rank 0's holds the whole report."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.redact import own_redactor
from dynamo_mpi.common.trace_context import trace_of
from dynamo_mpi.mpi.restart_count import restart_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.supervisor.rendezvous import Rendezvous


def write_failure(
    meeting: Rendezvous,
    failure: Failure,
    host: str,
    *,
    by: int | None = None,
    report: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> None:
    """Write a file, where there is a folder for it. That it can't be written is no reason for anything.

    Args:
        meeting: names the folder.
        failure: what to write.
        host: where it happened.
        by: the rank that writes, where it isn't the one that failed.
        report: more, of rank 0.
        keep: leave a file that is there: hosts that are cut off from each other may still share the folder, and rank 0's side knows best.
    """
    if not meeting.failure_dir:
        return
    content = _without_secrets({**as_document(failure, host), **(report or {})})
    path = _path(meeting, failure.rank if by is None else by)
    with contextlib.suppress(OSError):
        if keep and path.exists():
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # readable by its owner alone, and there at once with all that is in it
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
                file.write("\n")
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def as_document(failure: Failure, host: str) -> dict[str, Any]:
    """Return a failure as JSON has it; ``traceback`` is null where the error says all."""
    is_traceback = failure.text.startswith("Traceback")
    return {
        "rank": failure.rank,
        "host": host,
        "phase": failure.phase,
        "cause": failure.cause.name.lower(),
        "exit_code": failure.exit_code,
        "error": failure.text.rstrip().rpartition("\n")[2] if is_traceback else failure.text,
        "traceback": failure.text if is_traceback else None,
        "time": time.time() - (time.monotonic() - failure.at),
        "sequence": failure.sequence,
        "attempt": restart_count(os.environ),
        "trace_id": None if (trace := trace_of(os.environ)) is None else trace.trace_id,
    }


def remove_stale_failure_files(folder: Path | None, label: str) -> str:
    """Remove what an earlier start of this worker has left there, and say why nothing can be written there, if that is so."""
    if folder is None:
        return ""
    # it is made when it is needed
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"no failure files: {there} is no folder that can be written; correct --failure-dir"
    for path in folder.glob(f"{label}-rank-*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    return ""


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return own_redactor().redact(value)
    if isinstance(value, dict):
        return {name: _without_secrets(each) for name, each in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _path(meeting: Rendezvous, rank: int) -> Path:
    return Path(meeting.failure_dir) / f"{meeting.label}-rank-{rank}.json"
