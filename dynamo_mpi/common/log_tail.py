# SPDX-License-Identifier: Apache-2.0
"""Reads the last lines of log files, and follows them for ``--verbose``."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

TAIL_BYTES = 64 * 1024
MOST_TAIL_BYTES = 4 << 20


def last_lines(log: Path, count: int, since: int = 0) -> list[str]:
    """Return up to ``count`` last lines that aren't blank; none if there is no such file.

    Args:
        log: the file.
        count: lines at most.
        since: position in the file before which nothing counts.
    """
    return [line for line in last_text(log, since, TAIL_BYTES).splitlines() if line.strip()][-count:]


def last_text(log: Path, since: int = 0, most_bytes: int = MOST_TAIL_BYTES) -> str:
    """Return the end of a log; nothing if there is no such file.

    Args:
        log: the file.
        since: position in the file before which nothing counts.
        most_bytes: of it.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(since, file.tell() - most_bytes))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


class Follower:
    """Copies what is appended from now on to the logs of a folder to a stream, each line with its log's place in the folder before it.
    It ends when nobody reads the stream any more.

    Args:
        folder: of the logs.
        pattern: their names.
        stream: where lines go.
        only: lines with none of these texts are left out; without one, none is.
        period_seconds: between two looks.
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
        """Copy what is still missing, then end. Idempotent."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # whoever read the stream has gone
            while not self._end.wait(self._period):
                self._copy(whole=False)
            self._copy(whole=True)

    def _copy(self, *, whole: bool) -> None:
        """Copy complete lines; with ``whole`` also a last line without its end."""
        for log in sorted(self._folder.glob(self._pattern)):
            try:
                with log.open("rb") as file:
                    file.seek(self._offsets.get(log, 0))
                    new = file.read()
            except OSError:
                continue  # gone meanwhile, or its file system fails for a moment
            end = len(new) if whole else new.rfind(b"\n") + 1
            self._offsets[log] = self._offsets.get(log, 0) + end
            place = log.relative_to(self._folder).with_suffix("")
            lines = new[:end].decode(errors="replace").splitlines()
            with contextlib.suppress(OSError):  # whoever reads the stream has gone
                self._stream.writelines(f"[{place}] {line}\n" for line in lines if self._is_wanted(line))
                self._stream.flush()

    def _is_wanted(self, line: str) -> bool:
        return not self._only or any(text in line for text in self._only)
