# SPDX-License-Identifier: Apache-2.0
"""Writes all log lines of this process, with secrets redacted, to stderr and, if there is one, to the rank's log file of limited size."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
import time

from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.folder_walk import reason
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.log_record import Fact, Level, Line, is_true, least_level
from dynamo_mpi.common.own_files import OwnFolder, make_folder, open_own
from dynamo_mpi.common.redact import process_redactor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FILE_BYTES = 16 << 20
FILES = 3


class LogFile:
    """Appends to a file that only its owner can read; the file is created with the first line.

    Args:
        path: the file. A missing directory is created, for its owner only.
        most: largest size of one file in bytes.
        files: number of files that are kept, including the current one.
    """

    def __init__(self, path: str, most: int = FILE_BYTES, files: int = FILES) -> None:
        self.path, self._most, self._files = path, most, files
        self._descriptor = -1
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: they can't be written.
        """
        if self._descriptor < 0:
            self._open()
        elif self._bytes and self._bytes + len(data) > self._most:
            self._rotate()
        while data:
            written = os.write(self._descriptor, data)
            self._bytes += written
            data = data[written:]

    def close(self) -> None:
        """Close the file; the next line opens it again. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        make_folder(os.path.dirname(self.path))
        self._descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._bytes = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        folder, name = os.path.split(self.path)
        with OwnFolder(folder or ".") as opened:
            for number in range(self._files - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    opened.rename(name if number == 1 else f"{name}.{number - 1}", f"{name}.{number}")
        self._open()


_LINES_KEPT = 100
_WIDTH = 80
# after this, write without the lock: the thread that holds it may be stopped
_LOCK_SECONDS = 1.0


class LogFormat(NamedTuple):
    """The format of log lines.

    Args:
        least: the level below which lines are omitted.
        jsonl: whether each line is a JSON object.
    """

    least: int = int(Level.INFO)
    jsonl: bool = False

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> LogFormat:
        """Read it from Dynamo's ``DYN_LOG`` and ``DYN_LOGGING_JSONL``."""
        return cls(least_level(environ.get("DYN_LOG", "")), is_true(environ.get("DYN_LOGGING_JSONL", "")))


class LogWriter:
    """Writes log lines.

    Args:
        format: the lines' format.
    """

    def __init__(self, format: LogFormat) -> None:
        self.format = format
        # reentrant: a signal handler may interrupt the thread that holds it
        self._lock = threading.RLock()
        self._file: LogFile | None = None
        # lines that were written before the log file was opened
        self._early: collections.deque[bytes] | None = collections.deque(maxlen=_LINES_KEPT)
        self._drawn: Sequence[str] = ()
        self._is_visible = False

    def emit(
        self,
        rank: int | None,
        host: str,
        text: str,
        level: Level,
        fields: Mapping[str, Fact] | None = None,
    ) -> None:
        """Write a line. See `Line`. Errors are never omitted."""
        if level < self.format.least and level < Level.ERROR:
            return
        cleaned = {name: _clean(fact) for name, fact in (fields or {}).items()}
        line = Line(time.time(), level, rank, host, without_controls(process_redactor().redact(text)), cleaned)
        shown = line.as_json() if self.format.jsonl else line.as_text()
        with self._locked():
            self._show(_encoded(shown))
            self._log(_encoded(shown if self.format.jsonl else line.as_logged()), rank, host)

    def write_raw(self, data: bytes) -> None:
        """Write another process's output unchanged."""
        with self._locked():
            self._show(data)

    def open_file(self, folder: str, label: str, rank: int) -> None:
        """Write all lines to a file too, including those that were written already.

        Args:
            folder: the file's directory; empty for no file.
            label: prefix of the file's name.
            rank: this rank.
        """
        with self._locked():
            early, self._early = self._early or (), None
            if not folder:
                return
            self._file = LogFile(os.path.join(folder, f"{label}-rank-{rank}.log"))
            for line in early:
                self._log(line, rank, os.uname().nodename)

    @property
    def has_destination(self) -> bool:
        """Whether `open_file` was called."""
        return self._early is None

    def forget_history(self) -> None:
        """Drop the lines that were written so far: after a fork, they belong to the parent."""
        with self._locked():
            self._early = collections.deque(maxlen=_LINES_KEPT)

    def set_status_lines(self, lines: Sequence[str]) -> None:
        """Replace the status lines at the terminal's end; no lines erase them. For terminals only."""
        with self._locked():
            before, self._drawn = self._erasure(), tuple(lines)
            _write(before + self._drawing())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        taken = self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            yield
        finally:
            if taken:
                self._lock.release()

    def _show(self, data: bytes) -> None:
        if sys.stderr is not None:  # closed by the parent process
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
        # not after an incomplete line
        _write(self._erasure() + data + (self._drawing() if data.endswith(b"\n") else b""))

    def _erasure(self) -> bytes:
        """Return the escape sequence that erases the status lines."""
        if not self._is_visible:
            return b""
        self._is_visible = False
        try:
            # a terminal of unknown size returns 0
            width = os.get_terminal_size(2).columns or _WIDTH
        except OSError:
            return b""
        # the terminal may have become narrower
        rows = sum(max(1, -(-len(line) // width)) for line in self._drawn)
        return f"\x1b[{rows}A\r\x1b[J".encode()

    def _drawing(self) -> bytes:
        self._is_visible = bool(self._drawn)
        return _encoded("".join(f"{line}\n" for line in self._drawn))

    def _log(self, line: bytes, rank: int | None, host: str) -> None:
        if self._early is not None:
            self._early.append(line)
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            path, self._file = self._file.path, None
            text = f"warning: the log file {path} can't be written, so there is none: {reason(error)}"
            self.emit(rank, host, text, Level.WARN)


def _clean(fact: Fact) -> Fact:
    return process_redactor().redact(fact) if isinstance(fact, str) else fact


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _write(data: bytes) -> None:
    if data:
        with contextlib.suppress(OSError):  # the reader is gone; that must not fail the worker
            os.write(2, data)


log_writer = LogWriter(LogFormat.of(os.environ))
"""This process's log writer."""
