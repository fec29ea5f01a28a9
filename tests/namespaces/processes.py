# SPDX-License-Identifier: Apache-2.0
"""Processes by pid *and* start time, so that a pid used again is never taken for the old process.

A zombie counts as dead: PID 1 of a container often reaps nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import ClusterError

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessStat:
    """The three fields of /proc/PID/stat that matter here (proc(5)): start time in clock ticks since boot."""

    state: str
    parent: int
    start_ticks: int


def read_stat(pid: int) -> ProcessStat | None:
    """Return None for a process that is gone or only a zombie."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in parentheses may itself contain blanks and parentheses; fields are counted after its end
    fields = text[text.rindex(")") + 2 :].split()
    stat = ProcessStat(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))
    return None if stat.state in "ZX" else stat


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, for good."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        stat = read_stat(pid)
        return cls(pid, stat.start_ticks) if stat else None

    @classmethod
    def load(cls, path: Path) -> ProcessIdentity | None:
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def is_alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self

    def kill(self, timeout: float = 10.0) -> None:
        """SIGKILL it and wait until it is gone (seconds).

        Raises:
            ClusterError: it outlived the timeout.
        """
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + timeout
        while self.is_alive():
            if time.monotonic() > deadline:
                raise ClusterError(f"process {self.pid} is still there {timeout:g} s after SIGKILL")
            time.sleep(0.01)


def all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def children_of(pid: int) -> list[int]:
    """Living children, the oldest first."""
    stats = ((child, read_stat(child)) for child in all_pids())
    return [
        child for _, child in sorted((stat.start_ticks, child) for child, stat in stats if stat and stat.parent == pid)
    ]


def command_line(pid: int) -> list[str]:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def namespace_of(pid: int, kind: str) -> str | None:
    """The namespace's name, such as ``pid:[4026531836]``; None for a process that is gone or not ours to look at."""
    try:
        return os.readlink(PROC / str(pid) / "ns" / kind)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def processes_in_namespace(namespace: str, kind: str) -> list[int]:
    return [pid for pid in all_pids() if namespace_of(pid, kind) == namespace and read_stat(pid)]
