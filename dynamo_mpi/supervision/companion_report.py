# SPDX-License-Identifier: Apache-2.0
"""What a companion knows of a rank of its node, and how it tells of ranks that are late."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

from dynamo_mpi.supervision.stacks import describe_stacks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.launchers.launch import Launch

_READ_BYTES = 1 << 16
_MOST_LINE = 1 << 18
_CREDENTIALS = struct.Struct("3i")


class Local:
    """A rank of this node that is connected.

    Args:
        connection: to it; its other end's process is what the kernel says.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.connection = connection
        self._pid: int = _CREDENTIALS.unpack(credentials)[0]
        self.rank = -1
        self.phase = "world"
        self.heard = self.asked = time.monotonic()
        self._unread = b""
        self.stacks = ""
        # the verdict has come
        self.judged = False
        # needs us no longer
        self.left = False
        # says itself why it ends
        self.told = False
        # rank 0, or the rank through which rank 0 reaches a companion on another node
        self.leaves_to_us = False

    @property
    def is_watched_elsewhere(self) -> bool:
        """Whether rank 0 watches over it."""
        return self.judged and self.rank != 0

    def read(self) -> list[str] | None:
        """Return the lines that have come; None when there will be no more."""
        try:
            data = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data or len(self._unread) > _MOST_LINE:
            return None
        self.heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def send(self, line: str) -> None:
        """Tell it something; that it doesn't take it is seen by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(line.encode() + b"\n")

    def kill(self) -> None:
        """End a process that is stopped or stuck: it can't do that itself."""
        # 0: it lives where we can't see it
        if self._pid > 0:
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)


def describe_late(ranks: Sequence[Local], launch: Launch) -> str:
    """Say which ranks of this node are there and where they stand, and how many are missing.

    Args:
        ranks: those that are connected.
        launch: tells how many ranks this node should have.
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
