# SPDX-License-Identifier: Apache-2.0
"""The world's metrics as a file for node_exporter's textfile collector, kept by rank 0."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dynamo_mpi.common.hooks import WorldFailure

# an age beyond a few of these (node_textfile_mtime_seconds) means that nobody writes it any more
_PERIOD_SECONDS = 15.0
_END_SECONDS = 1.0
# the collector may be another user's, and nothing in it is secret
_MODE = 0o644


class MetricsFile(WorkerHook):
    """Keeps the file. It stays at the end, as that collector's users expect, and tells of it.

    Args:
        path: of the file; the collector reads only those that end in ``.prom``.
        render: returns what is in it.
        warn: logs a warning, once.
    """

    def __init__(self, path: Path, render: Callable[[], str], warn: Callable[[str], object]) -> None:
        self._path, self._render, self._warn = path, render, warn
        self._news = threading.Event()
        self._ended = False
        # the last word may come from another thread
        self._lock = threading.Lock()
        if path.suffix != ".prom":
            warn(f"node_exporter reads only files that end in .prom, and {path} does not")
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def on_phase(self, phase: str) -> None:
        """Have it written again soon."""
        self._news.set()

    def on_failure(self, failure: WorldFailure) -> None:
        """Have it written again soon."""
        self._news.set()

    def on_exit(self, code: int) -> None:
        """Write it for the last time, now, in a second at the most: a file system that hangs must not keep the ranks."""
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
            self._news.wait(_PERIOD_SECONDS)
            self._news.clear()

    def _write(self) -> None:
        try:
            write_whole(self._path, self._render())
        except OSError as error:
            self._warn(f"the metrics file {self._path} can't be written: {error.strerror}")
            self._warn = _nothing


def write_whole(path: Path, text: str) -> None:
    """Put a text where a file is, or isn't yet: whoever reads it finds all of the old one or all of the new one.

    Raises:
        OSError: it can't be written.
    """
    # the collector takes no file whose name doesn't end as its own do; always the same, so that one of a writer that was killed is
    # written over
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), _MODE)
            file.write(text)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _nothing(_: str) -> None:
    return
