# SPDX-License-Identifier: Apache-2.0
"""The segments of /dev/shm that MPI makes for the ranks of a node, which stay where ranks and launcher are killed."""

from __future__ import annotations

import contextlib
import os

_FOLDER = "/dev/shm/"  # noqa: S108 - not a temporary file: where MPI has its shared memory
# MPICH's; Open MPI 5's and 4's
_PREFIXES = ("mpich_shm_", "sm_segment.", "vader_segment.")


def segments_of(pid: int) -> frozenset[str]:
    """Return the files of MPI's shared memory that a process has mapped. Does not raise."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, slash, name = line.rstrip("\n").partition(_FOLDER)
            if slash and name.startswith(_PREFIXES):
                found.add(_FOLDER + name)
    return frozenset(found)


def remove_segments(paths: frozenset[str]) -> None:
    """Remove those that are still there, and are ours. Does not raise."""
    for path in paths:
        with contextlib.suppress(OSError):
            if (
                path.startswith(tuple(_FOLDER + prefix for prefix in _PREFIXES))
                and os.lstat(path).st_uid == os.getuid()
            ):
                os.unlink(path)
