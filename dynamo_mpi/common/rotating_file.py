# SPDX-License-Identifier: Apache-2.0
"""A log file of limited size: a full one is renamed to ``.1``, and ``.1`` to ``.2``, the last."""

from __future__ import annotations

import os

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
        folder = os.path.dirname(self.path)
        if folder:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        # not through a link: another user could make us write to another file
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o600)
        self._bytes = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(self._files - 1, 0, -1):
            older = self.path if number == 1 else f"{self.path}.{number - 1}"
            try:
                os.replace(older, f"{self.path}.{number}")
            except FileNotFoundError:
                continue
        self._open()
