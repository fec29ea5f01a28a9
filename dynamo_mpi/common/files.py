# SPDX-License-Identifier: Apache-2.0
"""Reads small text files that users name on a command line, with a size limit and without blocking forever."""

from __future__ import annotations

import os
import select
import stat
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import ConfigFileError

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 8 * 2**20
"""The size limit; the largest known config, GLM-5's with its 716 exclusions, has 36 kB."""
_PIPE_SECONDS = 5.0


def read_small_text(path: Path) -> str:
    """Read a small text file.

    Raises:
        OSError: it can't be read.
        ConfigFileError: the file is too large, not text, or a pipe without a writer.
    """
    # non-blocking: opening a pipe would block until a writer opens it
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            _await_writer(stream.fileno(), path)
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigFileError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB", needed="a config, not weights or a log"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"{path} is not text: {error.reason} at byte {error.start}") from None


def _await_writer(pipe: int, path: Path) -> None:
    if not select.select([pipe], [], [], _PIPE_SECONDS)[0]:
        raise ConfigFileError(
            f"nothing was written to the pipe {path} within {_PIPE_SECONDS:g} s", needed="a file with the config"
        )
    os.set_blocking(pipe, True)
