# SPDX-License-Identifier: Apache-2.0
"""A node agent's connection to a rank of its node, and the description of missing ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

from dynamo_mpi.supervisor.stacks import describe_stacks

if TYPE_CHECKING:
    from collections.abc import Sequence

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
