# SPDX-License-Identifier: Apache-2.0
"""What a node agent knows of a rank of its node, and how it describes ranks that are late."""

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
_MOST_LINE = 1 << 18
_MOST_DESCRIPTORS = 4
_CREDENTIALS = struct.Struct("3i")


class LocalRank:
    """A rank of this node that is connected.

    Args:
        connection: to it; the kernel says which process is at its other end.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.connection = connection
        self.pid: int = _CREDENTIALS.unpack(credentials)[0]
        # readable once the process has ended, also where another one holds its connection; None where the system has no such thing
        self.pidfd = _open_pidfd(self.pid)
        self.rank = -1
        self.phase = "mpi_init"
        self.heard = self.asked = time.monotonic()
        self._unread = b""
        self.stacks = ""
        # descriptors that it has handed over
        self.descriptors: list[int] = []
        # by what its descendants are known, see `descendants`
        self.mark = ""
        self.inode = 0
        # MPI's shared memory that it has mapped
        self.segments: frozenset[str] = frozenset()
        self.preflight_done = False
        # it leaves in order
        self.detached = False
        # it says itself why it ends
        self.reported = False

    @property
    def is_watched_elsewhere(self) -> bool:
        """Whether rank 0 watches for its silence."""
        return self.preflight_done and self.rank != 0

    def read(self) -> tuple[list[str], bool]:
        """Return all lines that have come, and whether there will be no more."""
        found: list[str] = []
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.connection, _READ_BYTES, _MOST_DESCRIPTORS)
            except BlockingIOError:
                return found, False
            except OSError:
                return found, True
            self.descriptors += descriptors
            if not data:
                return found, True
            self.heard = time.monotonic()
            *lines, self._unread = (self._unread + data).split(b"\n")
            if len(self._unread) > _MOST_LINE:
                # no line of ours: without its beginning it means nothing
                self._unread = b""
            found += [line.decode("utf-8", "replace") for line in lines]

    def send(self, line: str) -> None:
        """Send it a line; one that it doesn't take shows by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(line.encode() + b"\n")

    def kill(self) -> None:
        """End a process that is stopped or stuck: it can't do that itself."""
        with contextlib.suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif self.pid > 0:  # 0: it lives where it can't be seen from here
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close what belongs to it here, but for its process."""
        self.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def close_process(self) -> None:
        """Look at its process no longer."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _open_pidfd(pid: int) -> int | None:
    # a Python that was built for old kernels, as conda's, lacks it
    if pid <= 0 or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def describe_missing_ranks(ranks: Sequence[LocalRank], launch: LaunchInfo) -> str:
    """Say which ranks of this node are there and where they stand, and how many are missing.

    Args:
        ranks: those that are connected.
        launch: says how many ranks this node should have.
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
