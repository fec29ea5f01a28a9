# SPDX-License-Identifier: Apache-2.0
"""Writes the world's metrics to a file for node_exporter's textfile collector; runs on rank 0."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.own_files import reason, write_own
from dynamo_mpi.common.waiting import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dynamo_mpi.common.hooks import WorldFailure

# if the file is older than a few of these (node_textfile_mtime_seconds), it is no longer written
_PERIOD_SECONDS = 15.0
_END_SECONDS = 1.0
# the collector may run as another user, and the file contains no secret
_MODE = 0o644


class MetricsFile(WorkerHook):
    """Writes the file. It remains after the worker's end, as that collector's users expect, and contains the exit code.

    Args:
        path: path of the file; the collector reads only files that end in ``.prom``.
        render: returns its content.
        warn: logs a warning, once.
    """

    def __init__(self, path: Path, render: Callable[[], str], warn: Callable[[str], object]) -> None:
        self._path, self._render, self._warn = path, render, warn
        self._changed = threading.Event()
        self._ended = False
        # the last write may come from another thread
        self._lock = threading.Lock()
        if path.suffix != ".prom":
            warn(f"node_exporter reads only files that end in .prom, and {path} does not")
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def on_phase(self, phase: str) -> None:
        """Write the file again soon."""
        self._changed.set()

    def on_failure(self, failure: WorldFailure) -> None:
        """Write the file again soon."""
        self._changed.set()

    def on_exit(self, code: int) -> None:
        """Write the file for the last time, in at most a second: a file system that hangs must not block the ranks."""
        if (thread := start_thread(self._finish)) is not None:
            thread.join(_END_SECONDS)

    def _finish(self) -> None:
        with self._lock:
            self._ended = True
            self._write()

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                if not self._ended:
                    self._write()
            self._changed.wait(_PERIOD_SECONDS)
            self._changed.clear()

    def _write(self) -> None:
        try:
            write_own(self._path, self._render().encode(), _MODE, exact=True)
        except OSError as error:
            self._warn(f"the metrics file {self._path} can't be written: {reason(error)}")
            self._warn = _nothing


def _nothing(_: str) -> None:
    return
