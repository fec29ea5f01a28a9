# SPDX-License-Identifier: Apache-2.0
"""Reads the last lines of log files, and follows them for ``--verbose``."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.own_files import open_own

if TYPE_CHECKING:
    from collections.abc import Sequence

TAIL_BYTES = 64 * 1024
MOST_TAIL_BYTES = 4 << 20


def last_lines(log: Path, count: int, since: int = 0) -> list[str]:
    """Return up to ``count`` last non-blank lines; none if the file doesn't exist.

    Args:
        log: the file.
        count: largest number of lines.
        since: ignore everything before this position in the file.
    """
    return [line for line in last_text(log, since, TAIL_BYTES).splitlines() if line.strip()][-count:]


def last_text(log: Path, since: int = 0, most_bytes: int = MOST_TAIL_BYTES) -> str:
    """Return the end of a log; empty if the file doesn't exist.

    Args:
        log: the file.
        since: ignore everything before this position in the file.
        most_bytes: largest number of bytes.
    """
    try:
        with open(open_own(log, os.O_RDONLY), "rb") as file:
            file.seek(0, 2)
            file.seek(max(since, file.tell() - most_bytes))
            return _decoded(file.read())
    except FileNotFoundError:
        return ""


def _decoded(content: bytes) -> str:
    # mpirun ends some of its texts with the NUL of a C string
    return content.replace(b"\0", b"").decode(errors="replace")


class Follower:
    """Copies lines that are appended to a directory's logs to a stream, each with its log's relative path before it. It ends when the stream
    is closed by its reader.

    Args:
        folder: the directory.
        pattern: glob pattern of the logs.
        stream: where lines are written.
        only: if not empty, lines that contain none of these texts are omitted.
        period_seconds: seconds between two reads.
    """

    def __init__(
        self, folder: Path, pattern: str, stream: TextIO, *, only: Sequence[str] = (), period_seconds: float = 0.1
    ) -> None:
        self._folder, self._pattern, self._stream, self._only = folder, pattern, stream, only
        self._period = period_seconds
        self._offsets = {log: log.stat().st_size for log in folder.glob(pattern)}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Copy the rest, then stop. Idempotent."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the stream's reader is gone
            while not self._end.wait(self._period):
                self._copy(whole=False)
            self._copy(whole=True)

    def _copy(self, *, whole: bool) -> None:
        """Copy complete lines; with ``whole`` also an incomplete last line."""
        for log in sorted(self._folder.glob(self._pattern)):
            try:
                with open(open_own(log, os.O_RDONLY), "rb") as file:
                    file.seek(self._offsets.get(log, 0))
                    new = file.read()
            except OSError:
                continue  # removed meanwhile, or a temporary error of the file system
            end = len(new) if whole else new.rfind(b"\n") + 1
            self._offsets[log] = self._offsets.get(log, 0) + end
            place = log.relative_to(self._folder).with_suffix("")
            lines = _decoded(new[:end]).splitlines()
            with contextlib.suppress(OSError):  # the stream's reader is gone
                self._stream.writelines(
                    without_controls(f"[{place}] {line}\n") for line in lines if self._is_wanted(line)
                )
                self._stream.flush()

    def _is_wanted(self, line: str) -> bool:
        return not self._only or any(text in line for text in self._only)
