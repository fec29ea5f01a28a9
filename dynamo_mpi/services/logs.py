# SPDX-License-Identifier: Apache-2.0
"""The parts' log files: their last lines, and a follower for ``--verbose``."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TextIO

TAIL_BYTES = 64 * 1024


def last_lines(log: Path, count: int) -> list[str]:
    """Return up to ``count`` last lines that aren't blank; none if there is no such file."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


class Follower:
    """Copies what is appended to the logs of a folder to a stream, each line with its log's place in the folder before it.

    Args:
        folder: of the logs.
        pattern: their names.
        stream: where lines go.
        only: lines without this text are left out.
        period_seconds: between two looks.
    """

    def __init__(
        self, folder: Path, pattern: str, stream: TextIO, *, only: str = "", period_seconds: float = 0.1
    ) -> None:
        self._folder, self._pattern, self._stream, self._only = folder, pattern, stream, only
        self._period = period_seconds
        self._offsets: dict[Path, int] = {}
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
        while not self._end.wait(self._period):
            self._copy(whole=False)
        self._copy(whole=True)

    def _copy(self, *, whole: bool) -> None:
        """Copy complete lines; with ``whole`` also a last line without its end."""
        for log in sorted(self._folder.glob(self._pattern)):
            with log.open("rb") as file:
                file.seek(self._offsets.get(log, 0))
                new = file.read()
            end = len(new) if whole else new.rfind(b"\n") + 1
            self._offsets[log] = self._offsets.get(log, 0) + end
            place = log.relative_to(self._folder).with_suffix("")
            lines = new[:end].decode(errors="replace").splitlines()
            with contextlib.suppress(OSError):  # whoever reads the stream has gone
                self._stream.writelines(f"[{place}] {line}\n" for line in lines if self._only in line)
                self._stream.flush()
