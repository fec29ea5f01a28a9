# SPDX-License-Identifier: Apache-2.0
"""MPI's segments in /dev/shm, which remain if ranks and launcher are killed."""

from __future__ import annotations

import contextlib
import os

_FOLDER = "/dev/shm/"  # noqa: S108 - not a temporary file: MPI's shared memory
# MPICH's; Open MPI 5's and 4's
_PREFIXES = ("mpich_shm_", "sm_segment.", "vader_segment.")


def segments_of(pid: int) -> frozenset[str]:
    """Return the MPI shared memory files that a process has mapped. Does not raise."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, slash, name = line.rstrip("\n").partition(_FOLDER)
            if slash and name.startswith(_PREFIXES):
                found.add(_FOLDER + name)
    return frozenset(found)


def remove_segments(paths: frozenset[str]) -> None:
    """Remove those that still exist and belong to this user. Does not raise."""
    for path in paths:
        with contextlib.suppress(OSError):
            if (
                path.startswith(tuple(_FOLDER + prefix for prefix in _PREFIXES))
                and os.lstat(path).st_uid == os.getuid()
            ):
                os.unlink(path)
