# SPDX-License-Identifier: Apache-2.0
"""Rank 0 writes the picture of its worker's start: once it is ready, and again at its end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.observe.shown import shown
from dynamo_mpi.observe.timeline import ENDED, FAILED, READY, STOPPED, Mishap, Start, printable
from dynamo_mpi.supervision.failure import Cause

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.control_plane.records import WorkerRecord
    from dynamo_mpi.supervision.guard import Guard
    from dynamo_mpi.talk import Voice

# at the end of a world, a file system that hangs must not keep the ranks
_END_SECONDS = 1.0


class TimelineWriter:
    """Writes one worker's timeline. Thread-safe.

    Args:
        path: of the page; the trace stands beside it.
        record: what the worker is.
        guard: knows the ranks' phases, and what has failed.
        voice: warns where it can't be written.
    """

    def __init__(self, path: Path, record: WorkerRecord, guard: Guard, voice: Voice) -> None:
        self._path, self._record, self._guard, self._voice = path, record, guard, voice
        self._lock = threading.Lock()
        self._ready: float | None = None
        self._over = False

    def ready(self) -> None:
        """Note that the worker is ready, and write, without keeping it from its requests."""
        self._ready = time.time()
        self._begin(READY)

    def finish(self) -> None:
        """Write what is known at the end, within a second."""
        self._begin(ENDED).join(_END_SECONDS)

    def _begin(self, outcome: str) -> threading.Thread:
        thread = threading.Thread(target=self._write, args=(outcome,), name="timeline", daemon=True)
        thread.start()
        return thread

    def _write(self, outcome: str) -> None:
        with self._lock:
            if outcome == READY and self._over:
                return
            self._over = outcome != READY
            # nobody waits for it here, as all ranks would for rank 0 before they load
            from dynamo_mpi.observe.timeline_files import write_timeline

            start = self._start(outcome)
            try:
                write_timeline(self._path, [start])
            except OSError as error:
                self._voice.say(f"warning: the timeline {self._path} can't be written: {error.strerror}")

    def _start(self, outcome: str) -> Start:
        record = self._record
        mishap = None if outcome == READY else self._mishap()
        if mishap is not None:
            outcome = STOPPED if mishap.rank is None else FAILED
        return Start(
            name=printable(self._path.stem),
            role=record.role,
            engine=record.engine,
            model=printable(record.model),
            endpoint=printable(record.endpoint),
            outcome=outcome,
            written=time.time(),
            ready=self._ready,
            ranks=tuple(rank._replace(host=printable(rank.host)) for rank in self._guard.roll.ranks()),
            layout=record.layout,
            failure=mishap,
            job=record.job,
            step=record.step,
            attempt=record.attempt,
        )

    def _mishap(self) -> Mishap | None:
        if not self._guard.failures:
            return None
        first = self._guard.failures[0]
        host = printable(self._guard.roll.ranks()[first.rank].host)
        rank = None if first.cause is Cause.SIGNAL else first.rank
        error = printable(shown(first.text))
        return Mishap(rank, host, first.phase, error, first.exit_code, first.cause is Cause.TOLD)
