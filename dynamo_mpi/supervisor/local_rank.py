# SPDX-License-Identifier: Apache-2.0
"""A node agent's ranks: its connection to each rank of its node, and the description of missing ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple, Protocol
from dynamo_mpi.supervisor.stacks import describe_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.mpi.launcher import LaunchInfo

_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 18
_MAX_DESCRIPTORS = 4
_CREDENTIALS = struct.Struct("3i")


class LocalRank:
    """A connected rank of this node.

    Args:
        connection: connection to the rank; the kernel returns the peer's process id.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.connection = connection
        self.pid: int = _CREDENTIALS.unpack(credentials)[0]
        # becomes readable when the process exits, even if another process holds the connection; None if not supported
        self.pidfd = _open_pidfd(self.pid)
        self.rank = -1
        self.phase = "mpi_init"
        self.last_seen = self.last_ping = time.monotonic()
        self._unread = b""
        self.stacks = ""
        # descriptors that the rank has passed
        self.descriptors: list[int] = []
        # identify the rank's descendants, see `descendants`
        self.mark = ""
        self.inode = 0
        # MPI shared memory that the rank has mapped
        self.segments: frozenset[str] = frozenset()
        # its folder of compile caches
        self.caches = ""
        self.exit_status: int | None = None
        self.preflight_done = False
        # it shuts down in order
        self.detached = False
        # it reports by itself why it exits
        self.reported = False

    @property
    def is_watched_by_rank0(self) -> bool:
        """Whether rank 0's heartbeat server detects if this rank hangs."""
        return self.preflight_done and self.rank != 0

    def read(self) -> tuple[list[str], bool]:
        """Return all lines that have arrived, and whether the connection has closed."""
        found: list[str] = []
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.connection, _READ_BYTES, _MAX_DESCRIPTORS)
            except BlockingIOError:
                return found, False
            except OSError:
                return found, True
            self.descriptors += descriptors
            if not data:
                return found, True
            self.last_seen = time.monotonic()
            *lines, self._unread = (self._unread + data).split(b"\n")
            if len(self._unread) > _MAX_LINE_BYTES:
                # not a line of this protocol
                self._unread = b""
            found += [line.decode("utf-8", "replace") for line in lines]

    def note(self, key: str, value: str) -> bool:
        """Note what the rank says about itself; return False if it is about something else."""
        if key == "rank" and value.isdecimal():
            self.rank = int(value)
            self.send(f"agent {os.getpid()}")
        elif key == "mark":
            mark, _, inode = value.partition(" ")
            self.mark, self.inode = mark, int(inode) if inode.isdecimal() else 0
        elif key == "phase":
            self.phase = value
        elif key == "stacks":
            self.stacks = value.replace("\v", "\n")
        elif key == "segments":
            self.segments |= frozenset(value.split())
        elif key == "caches":
            self.caches = value
        elif key == "detach":
            self.detached = True
        else:
            return False
        return True

    def send(self, line: str) -> None:
        """Send the rank a line. Does not raise: the heartbeat timeout detects a rank that reads nothing."""
        with contextlib.suppress(OSError):
            self.connection.send(line.encode() + b"\n")

    def kill(self) -> None:
        """Kill the rank's process, which may be stopped or stuck."""
        with contextlib.suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif self.pid > 0:  # 0: the process is in a pid namespace that is not visible from here
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the connection and the passed descriptors, but not the pidfd."""
        self.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def close_process(self) -> None:
        """Close the pidfd."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class RankObserver(Protocol):
    """Shows the state of the rank that started the agent. Its methods are called in the agent's thread; they neither raise nor wait."""

    def on_message(self, text: str) -> None:
        """Called whenever that rank is heard; ``text`` is what it says about its state, or empty."""

    def on_exit(self) -> None:
        """Called when that rank's process has exited."""


class LocalRanks(NamedTuple):
    """The ranks of an agent's node, as the watch of the world sees them.

    Args:
        host: the node.
        end: ends them with an exit code.
        rank0_reports: returns whether rank 0 is among them, alive, and supervises the other ranks.
    """

    host: str
    end: Callable[[int], None]
    rank0_reports: Callable[[], bool]


def _open_pidfd(pid: int) -> int | None:
    # a Python built for old kernels, such as conda's, lacks it
    if pid <= 0 or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def describe_missing_ranks(ranks: Sequence[LocalRank], launch: LaunchInfo) -> str:
    """Describe which ranks of this node are connected, how many are missing, and the stacks of the connected ranks.

    Args:
        ranks: the connected ranks.
        launch: contains the number of ranks of this node.
    """
    present = sorted(ranks, key=lambda local: local.rank)
    lines = [f"  here: {_ranks([local.rank for local in present])}"]
    if launch.local_size is not None and len(present) < launch.local_size:
        lines.append(
            f"  missing here: {launch.local_size - len(present)} of {launch.local_size} ranks, which have not started, or ended before"
        )
    stacks = {local.rank: local.stacks for local in present if local.stacks}
    silent = [local.rank for local in present if not local.stacks]
    lines += ["  where they are:", *(f"    {line}" for line in describe_stacks(stacks, silent, _ranks).splitlines())]
    return "\n".join(lines)


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(str(number) for number in numbers)
