# SPDX-License-Identifier: Apache-2.0
"""Timelines on disk: the page, the trace beside it, and either of them read back."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from typing import TYPE_CHECKING

from dynamo_mpi.errors import DataError, UsageError
from dynamo_mpi.observe.timeline import unpack_starts
from dynamo_mpi.observe.timeline_page import DATA_BEGINS, DATA_ENDS, page
from dynamo_mpi.observe.timeline_paths import trace_path
from dynamo_mpi.observe.timeline_trace import trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dynamo_mpi.observe.timeline import Start

_MOST_BYTES = 64 * 2**20


def write_timeline(path: Path, starts: Sequence[Start]) -> None:
    """Write the page, and the trace beside it.

    Raises:
        OSError: they can't be written.
    """
    # a file in a folder's place is better said by what comes next
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True)
    write_whole(path, page(starts))
    write_whole(trace_path(path), json.dumps(trace(starts), separators=(",", ":")) + "\n")


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there at once with all that is in it, readable by its owner alone.

    Raises:
        OSError: it can't be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def read_starts(path: Path) -> tuple[Start, ...]:
    """Read a page or a trace that a worker, or ``dynamo-mpi timeline``, has written.

    Raises:
        UsageError: it can't be read.
        DataError: it is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}", fix="check its path and rights") from None
    except UnicodeDecodeError:
        content = ""
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES // 2**20} MiB")
        if content.lstrip().startswith("<"):
            _, found, rest = content.partition(DATA_BEGINS)
            if not found:
                raise ValueError("a page without a timeline's data")
            content = rest.partition(DATA_ENDS)[0]
        starts = unpack_starts(content)
        if not starts:
            raise ValueError("without workers")
        return starts
    except ValueError as error:
        raise DataError(
            f"{path} is no timeline: {error}",
            needed="a page or a trace that a worker wrote with --timeline",
            fix="name the file that --timeline named, or with --run-dir the folder of dynamo-mpi launch",
        ) from None
