# SPDX-License-Identifier: Apache-2.0
"""Failures as JSON files, one per failed rank, for programs that supervise many workers. Rank 0's file holds the whole report."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.common.trace_context import trace_of
from dynamo_mpi.mpi.restart_count import restart_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.supervisor.rendezvous import Rendezvous


def write_failure(
    rendezvous: Rendezvous,
    failure: Failure,
    host: str,
    *,
    by: int | None = None,
    report: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> None:
    """Write a failure file if a failure directory is configured. Does not raise if it can't be written.

    Args:
        rendezvous: names the directory.
        failure: the failure.
        host: the host where it happened.
        by: the rank whose file it becomes; None for the rank that failed.
        report: additional keys, from rank 0.
        keep: don't replace an existing file: hosts cut off from each other may share the directory, and rank 0's side knows more.
    """
    if not rendezvous.failure_dir:
        return
    content = _without_secrets({**as_document(failure, host), **(report or {})})
    path = _path(rendezvous, failure.rank if by is None else by)
    with contextlib.suppress(OSError):
        if keep and path.exists():
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # readable by its owner alone, and replaced atomically
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
    """Return the JSON content of a failure file; ``traceback`` is null if the error is not a traceback."""
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
    """Remove the failure files of an earlier start of this worker; return why none can be written, or an empty text."""
    if folder is None:
        return ""
    # the directory is created only when it is needed
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"no failure files: {existing} is no folder that can be written; correct --failure-dir"
    for path in folder.glob(f"{label}-rank-*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    return ""


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return process_redactor().redact(value)
    if isinstance(value, dict):
        return {name: _without_secrets(each) for name, each in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _path(rendezvous: Rendezvous, rank: int) -> Path:
    return Path(rendezvous.failure_dir) / f"{rendezvous.label}-rank-{rank}.json"
