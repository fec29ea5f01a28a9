# SPDX-License-Identifier: Apache-2.0
"""The copies of models on this node, as ``dynamo-mpi stage`` and ``doctor`` show them. Nothing is created."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.folder_walk import user_folder
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.file_system import file_system_type, free_bytes, is_in_memory
from dynamo_mpi.stage.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.stage.store import Entry


class Staged(NamedTuple):
    """What is staged below a folder.

    Args:
        path: this user's folder in it, which may not be there yet.
        kind: the file system's type.
        free: bytes that can be written.
        entries: the copies.
    """

    path: str
    kind: str
    free: int
    entries: Sequence[Entry] = ()

    @property
    def summary(self) -> str:
        """How many copies there are, their size, where, and the room for more."""
        count = f"{len(self.entries)} {'copy' if len(self.entries) == 1 else 'copies'}"
        where = "memory" if is_in_memory(self.kind) else self.kind or "disk"
        return f"{count}, {gib(sum(entry.size for entry in self.entries))}, in {self.path} ({where}, {gib(self.free)} free)"


def read_staged(folder: str) -> Staged:
    """Read what is staged below a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        StageError: it can't be used.
    """
    path, entries = os.path.join(folder, user_folder()), list["Entry"]()
    os.stat(folder)
    with contextlib.suppress(FileNotFoundError), contextlib.closing(Store(folder, create=False)) as store:
        path, entries = store.path, store.entries()
    return Staged(path, file_system_type(folder), free_bytes(folder), entries)


def describe(entry: Entry) -> str:
    """Describe a copy: its name, size, state, and what it is a copy of."""
    if entry.complete:
        state = "in use" if entry.in_use else time.strftime("used %Y-%m-%d %H:%M", time.localtime(entry.used))
    elif entry.source:
        state = "damaged: a file is not as it was copied"
    else:
        state = "being made" if entry.in_use else "left by a worker that was killed"
    return (
        f"{sanitize(entry.name)}  {gib(entry.size)}  {state}{f', of {sanitize(entry.source)}' if entry.source else ''}"
    )
