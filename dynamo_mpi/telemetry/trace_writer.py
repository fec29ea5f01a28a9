# SPDX-License-Identifier: Apache-2.0
"""Rank 0 writes the timeline of its worker's start: when the worker is ready, and again when it ends."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.own_files import make_folder, remove_own, write_own
from dynamo_mpi.common.redact import safe_first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.discovery.records import WorkerRecord
    from dynamo_mpi.supervisor.supervisor import WorldSupervisor
    from dynamo_mpi.telemetry.startup_trace import FailureMark, StartupTrace

# a file system that hangs must not delay the end of the ranks
_END_SECONDS = 1.0


def perfetto_path(path: Path) -> Path:
    """Return the path of the Perfetto trace beside a page."""
    return path.with_suffix(".trace.json")


def remove_stale_timeline(path: Path) -> str:
    """Remove the page and the Perfetto trace of an earlier start; return why they can't be removed, or an empty text."""
    problems = [remove_own(stale) for stale in (path, perfetto_path(path))]
    return next(filter(None, problems), "")


def write_timeline(path: Path, traces: Sequence[StartupTrace]) -> None:
    """Write the page, and the Perfetto trace beside it.

    Raises:
        OSError: they can't be written.
    """
    # imported in the thread that writes: all ranks wait for rank 0 before they load, and must not wait for this
    from dynamo_mpi.telemetry.timeline_page import page
    from dynamo_mpi.telemetry.timeline_text import perfetto_trace

    make_folder(path.parent)
    write_own(path, page(traces).encode(errors="replace"))
    write_own(perfetto_path(path), f"{json.dumps(perfetto_trace(traces), separators=(',', ':'))}\n".encode())


class TraceWriter(WorkerHook):
    """Writes one worker's timeline. Thread-safe.

    Args:
        path: of the page; the Perfetto trace is written beside it.
        record: describes the worker.
        guard: has the ranks' phases and failures.
        log: logs a warning if the files can't be written.
    """

    def __init__(self, path: Path, record: WorkerRecord, guard: WorldSupervisor, log: RankLogger) -> None:
        self._path, self._record, self._guard, self._log = path, record, guard, log
        self._lock = threading.Lock()
        self._ready: float | None = None
        self._ended = False

    def on_ready(self) -> None:
        """Record that the worker is ready, and write in another thread."""
        self._ready = time.time()
        self._start_thread(ended=False)

    def on_exit(self, code: int) -> None:
        """Write how the worker ended; returns after at most a second."""
        self._start_thread(ended=True).join(_END_SECONDS)

    def _start_thread(self, *, ended: bool) -> threading.Thread:
        thread = threading.Thread(target=self._write, args=(ended,), name="timeline", daemon=True)
        thread.start()
        return thread

    def _write(self, ended: bool) -> None:
        with self._lock:
            if self._ended and not ended:
                return
            self._ended = ended
            try:
                write_timeline(self._path, [self._trace(ended)])
            except OSError as error:
                self._log.warning(f"the timeline {self._path} can't be written: {reason(error)}")

    def _trace(self, ended: bool) -> StartupTrace:
        from dynamo_mpi.telemetry.startup_trace import ENDED, FAILED, READY, STOPPED, StartupTrace, printable

        record = self._record
        failure = self._failure() if ended else None
        outcome = ENDED if ended else READY
        if failure is not None:
            outcome = STOPPED if failure.rank is None else FAILED
        return StartupTrace(
            name=printable(self._path.stem),
            role=record.role,
            engine=record.engine,
            model=printable(record.model),
            endpoint=printable(record.endpoint),
            outcome=outcome,
            written=time.time(),
            ready=self._ready,
            ranks=tuple(rank._replace(host=printable(rank.host)) for rank in self._guard.tracker.ranks()),
            layout=record.layout,
            failure=failure,
            job=record.job,
            step=record.step,
            attempt=record.attempt,
        )

    def _failure(self) -> FailureMark | None:
        from dynamo_mpi.telemetry.startup_trace import FailureMark, printable

        if not self._guard.failures:
            return None
        first = self._guard.failures[0]
        host = printable(self._guard.tracker.ranks()[first.rank].host)
        rank = None if first.cause is DetectedBy.SIGNAL else first.rank
        error = printable(safe_first_line(first.text))
        return FailureMark(rank, host, first.phase, error, first.exit_code, first.cause is DetectedBy.REPORT)
