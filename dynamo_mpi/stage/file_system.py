# SPDX-License-Identifier: Apache-2.0
"""What the system knows of a file system, its files and the node's memory."""

from __future__ import annotations

import contextlib
import os

from dynamo_mpi.common.cgroup import read_limits

_SHARED_TYPES = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "9p", "afs", "fuse"}
)
_MEMORY_TYPES = frozenset({"tmpfs", "ramfs"})


def file_system_type(path: str) -> str:
    """Return the type of a path's file system, as in /proc/mounts; empty if it isn't known."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    found = ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                found = after.split()[0]
    return found


def is_shared(kind: str) -> bool:
    """Return whether several nodes see a file system of this type."""
    return kind.partition(".")[0] in _SHARED_TYPES and "overlay" not in kind


def is_in_memory(kind: str) -> bool:
    """Return whether what is on a file system of this type takes memory of the node."""
    return kind in _MEMORY_TYPES


def free_bytes(folder: str) -> int:
    """Return how many bytes can be written in a folder; of memory, what the node and the job's limit can give."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if not is_in_memory(file_system_type(folder)):
        return free
    limits = read_limits()
    left = free if limits.memory is None else max(0, limits.memory - limits.memory_used)
    return min(free, available_memory(), left)


def available_memory() -> int:
    """Return how many bytes of memory the node can give; a number that no node has if it isn't known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        return 1 << 62


def size_on_disk(folder: str) -> int:
    """Return how many bytes the files below a folder take."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_blocks * 512
    return total
