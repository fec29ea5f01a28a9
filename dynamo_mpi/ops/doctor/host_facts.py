# SPDX-License-Identifier: Apache-2.0
"""Facts about this host that doctor evaluates: the limits of its cgroup, and unused files in /dev/shm."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# version 1 writes "no limit" as a number of pages that no machine has
_UNLIMITED = 2**62


class CgroupLimits(NamedTuple):
    """The limits of the cgroup.

    Args:
        cpus: CPUs' worth of time; None for no limit.
        memory: bytes; None for no limit.
        memory_used: bytes that count against it.
    """

    cpus: float | None = None
    memory: int | None = None
    memory_used: int = 0


def read_limits(root: Path = _ROOT, own: Path = _OWN) -> CgroupLimits:
    """Read the limits; a limit that can't be read is None."""
    places = own_groups(_text(own))
    cpus: list[float] = []
    memory: list[tuple[int, int]] = []
    for folder in _upwards(root, places.get("", "")):
        cpus += [share for share in (cpu_share(_text(folder / "cpu.max")),) if share is not None]
        memory += _memory(folder, "memory.max", "memory.current")
    for folder in _upwards(root / "memory", places.get("memory", "/")):
        memory += _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder in _upwards(root / "cpu", places.get("cpu", "/")):
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        cpus += [share for share in (cpu_share(f"{quota} {period}"),) if share is not None]
    limit, used = min(memory, default=(None, 0))
    return CgroupLimits(min(cpus, default=None), limit, used)


def own_groups(text: str) -> dict[str, str]:
    """Parse ``/proc/self/cgroup``: the group's path by version 1's controller; version 2's has the empty name."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for controller in controllers.split(","):
            found[controller] = path
    return found


def cpu_share(text: str) -> float | None:
    """Read ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``, ``-1 PERIOD``: the CPUs' worth of time; None for no limit."""
    fields = text.split()
    if len(fields) != 2 or not all(field.isdecimal() for field in fields) or not int(fields[1]):
        return None
    return int(fields[0]) / int(fields[1])


def _memory(folder: Path, limit: str, usage: str) -> list[tuple[int, int]]:
    text, used = _text(folder / limit), _text(folder / usage)
    if not text.isdecimal() or int(text) >= _UNLIMITED:
        return []
    return [(int(text), int(used) if used.isdecimal() else 0)]


def _upwards(root: Path, path: str) -> list[Path]:
    """Return the group's folder and its parents. In a container the path may be the host's, and only the root exists."""
    folder = root / path.lstrip("/")
    inside = [folder, *folder.parents]
    return [one for one in inside if one == root or root in one.parents]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


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
