# SPDX-License-Identifier: Apache-2.0
"""The limits of this process's cgroup, of version 1 and 2: a Slurm job's or a container's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# version 1 writes "no limit" as a number of pages that no machine has
_UNLIMITED = 2**62


class CgroupLimits(NamedTuple):
    """The limits of the cgroup.

    Args:
        cpus: CPUs' worth of time; None for no limit.
        memory: bytes; None for no limit.
        memory_used: bytes that count against it, without those of cached files, which the kernel gives back.
    """

    cpus: float | None = None
    memory: int | None = None
    memory_used: int = 0


def read_limits(root: Path = _ROOT, own: Path = _OWN) -> CgroupLimits:
    """Read the limits, of memory that of the group with the least left; a limit that can't be read is None."""
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
    limit, used = min(memory, key=lambda pair: pair[0] - pair[1], default=(None, 0))
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
    return [(int(text), max(0, int(used) - _cached(folder)) if used.isdecimal() else 0)]


def _cached(folder: Path) -> int:
    """Return the bytes of cached files; those of tmpfs aren't among them (cgroup-v2.rst, ``memory.stat``)."""
    figures = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    found = [figures.get(f"total_{name}", figures.get(name, "")) for name in ("active_file", "inactive_file")]
    return sum(int(figure) for figure in found if figure.isdecimal())


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
