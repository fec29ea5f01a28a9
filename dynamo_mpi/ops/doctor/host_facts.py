# SPDX-License-Identifier: Apache-2.0
"""Facts about this host that doctor evaluates: unused files in /dev/shm."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

# no process has a file open for a moment while it is created
_YOUNG_SECONDS = 60.0


class Segment(NamedTuple):
    """A file of this user in shared memory.

    Args:
        path: its path.
        size: its bytes.
        age: seconds since the last write.
    """

    path: str
    size: int
    age: float


def own_segments(folder: str) -> list[Segment]:
    """Return this user's files in the folder and its subfolders."""
    now = time.time()
    found = []
    for path in _files(folder):
        try:
            stat = os.lstat(path)
        except OSError:
            continue  # removed since
        if stat.st_uid == os.getuid():
            found.append(Segment(path, stat.st_size, max(0.0, now - stat.st_mtime)))
    return found


def unused(segments: Iterable[Segment], in_use: set[str]) -> list[Segment]:
    """Return the files that no process has mapped or open, the largest first."""
    left = [one for one in segments if one.path not in in_use and one.age > _YOUNG_SECONDS]
    return sorted(left, key=lambda one: -one.size)


def _files(folder: str) -> Iterable[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            try:
                yield from sorted(one.path for one in os.scandir(entry.path) if one.is_file(follow_symlinks=False))
            except OSError:
                continue
        else:
            yield entry.path
