# SPDX-License-Identifier: Apache-2.0
"""What is seen of a worker from outside, and what a fault may have left: keys, streams, processes, shared memory; and a lack of memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.dynamo.running import eventually

PROGRAMS = Path(__file__).parent / "dynamo" / "programs"
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
# what a process has already isn't counted in its new group: so little that whatever it takes next is too much
_FEW_BYTES = 1 << 16


class Streams:
    """Requests in flight, held by ``hold_streams.py``.

    Args:
        process: that program, its stdout a pipe.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_open(self) -> None:
        """Wait until all have begun."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == "open", (line, self.process.stderr.read() if self.process.stderr else "")

    def ends(self, seconds: float) -> list[dict[str, Any]]:
        """Wait for all ends, and return them."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"streams are open after {seconds} s: {error.output!r}") from None
        return [json.loads(line) for line in out.splitlines()]


class Keys:
    """The worker's keys in etcd over time, from ``watch_keys.py``.

    Args:
        process: that program, its stdout a pipe.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._changes: list[tuple[float, list[str]]] = []
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()
        eventually(lambda: self._changes, "etcd's keys are known", 20)

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            when, keys = json.loads(line)
            self._changes.append((when, keys))

    @property
    def now(self) -> list[str]:
        """Those that are there now."""
        return self._changes[-1][1]

    def gone_since(self) -> float:
        """Return the wall-clock time since which there are none; infinity where there are some."""
        when, keys = self._changes[-1]
        return float("inf") if keys else when


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the failure files of a folder by name."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def environment_of(pid: int) -> bytes:
    """Return the environment that a process was started with; nothing if it has gone meanwhile."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def processes_with(text: str) -> list[int]:
    """Return the pids of this machine whose environment has ``text``, of every session and namespace, without zombies."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and text.encode() in environment_of(pid)]


def remaining(text: str) -> list[str]:
    """Return the processes whose environment has ``text``, in words, that don't end within a second: node agents write to etcd until then."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: not processes_with(text), "all have ended", 1)
    return [f"process {pid}" for pid in processes_with(text)]


def find_child(pids: Sequence[int]) -> int:
    """Return the one that runs ``dynamo.trtllm``, 0 for none."""
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[3:4] == [b"dynamo.trtllm"]:
                return pid
    return 0


AGENT_TITLE = "dynamo_mpi: node agent on {}"
"""What ``ps`` shows of a node's agent."""


def find_agent(pids: Sequence[int], host: str) -> int:
    """Return the one that is the agent of a host, 0 for none."""
    title = AGENT_TITLE.format(host).encode()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == title:
                return pid
    return 0


def replace_agent(pids: Callable[[], Sequence[int]], host: str, seconds: float = 10.0) -> None:
    """Kill a host's agent, and wait for another one.

    Args:
        pids: returns those of the host.
        host: its name.
        seconds: how long another one may take.
    """
    agent = eventually(lambda: find_agent(pids(), host), f"an agent on {host}", seconds)
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: find_agent(pids(), host) not in (0, agent), f"another agent on {host}", seconds)


def why_no_memory_limit() -> str:
    """Return why this machine can't give a process a memory limit; empty where it can."""
    try:
        group = make_group()
    except OSError as error:
        return f"no memory cgroup can be made here: {error}"
    group.rmdir()
    return ""


def make_group() -> Path:
    """Make a memory cgroup.

    Raises:
        OSError: this machine has none, or doesn't let this user make one.
    """
    v1 = (V1 / "memory.limit_in_bytes").exists()
    if not v1 and "memory" not in (V2 / "cgroup.subtree_control").read_text().split():
        raise FileNotFoundError("the memory controller isn't enabled")
    group = (V1 if v1 else V2) / f"dynmpi-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    return group


@contextlib.contextmanager
def run_out_of_memory(pid: int) -> Iterator[float]:
    """Give a process less memory than it needs, and wait for the kernel to kill it; yields the time when that was seen."""
    if pid <= 0:
        raise ValueError("cgroups take 0 for the process that writes it")
    group = make_group()
    try:
        limit = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / limit).write_text(str(_FEW_BYTES))
        (group / "cgroup.procs").write_text(str(pid))
        _take_memory(pid)
        eventually(lambda: has_ended(pid), "memory has run out", 30)
        yield time.time()
    finally:
        eventually(lambda: _removed(group), "the cgroup is empty", 20)


def _take_memory(pid: int) -> None:
    """Use pages that a process has mapped and never used: one that only waits takes none itself, or takes them when the case is over."""
    page, entry = os.sysconf("SC_PAGE_SIZE"), 8
    with contextlib.ExitStack() as files, contextlib.suppress(OSError):  # memory has run out, or the process has gone
        maps, pagemap = (files.enter_context(open(f"/proc/{pid}/{name}", "rb")) for name in ("maps", "pagemap"))
        memory = files.enter_context(open(f"/proc/{pid}/mem", "r+b", buffering=0))
        untaken = 2 * _FEW_BYTES // page
        for mapping in maps.read().decode().splitlines():
            addresses, mode, _, _, inode = mapping.split()[:5]
            if mode != "rw-p" or inode != "0":
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            states = os.pread(pagemap.fileno(), (end - start) // page * entry, start // page * entry)
            for number, (state,) in enumerate(struct.iter_unpack("=Q", states)):
                if not state >> 62 and untaken:  # neither in memory nor swapped out
                    os.pwrite(memory.fileno(), b"\0", start + number * page)
                    untaken -= 1


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, also if no other has fetched its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def end_process(process: subprocess.Popen[Any]) -> None:
    """Kill a helper program and close its pipes."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.communicate()
