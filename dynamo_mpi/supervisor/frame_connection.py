# SPDX-License-Identifier: Apache-2.0
"""One liveness connection: frames in, frames out, never waiting; the kernel looks after the host at its other end."""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import termios
from typing import TYPE_CHECKING

from dynamo_mpi.supervisor.heartbeat_protocol import FrameDecoder

if TYPE_CHECKING:
    from dynamo_mpi.supervisor.heartbeat_protocol import Frame

_READ_BYTES = 1 << 16
_MOST_UNSENT = 1 << 18
# a host that is gone is found out within about 20 s, whether or not we have something to send to it
_IDLE_SECONDS, _INTERVAL_SECONDS, _PROBES = 5, 5, 3
_USER_TIMEOUT_MS = 20_000
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class ClosedError(Exception):
    """The connection has ended.

    Args:
        lost: the other host doesn't answer, so nothing is known of the process there.
    """

    def __init__(self, *, lost: bool) -> None:
        super().__init__("the host does not answer" if lost else "closed")
        self.lost = lost


class FrameConnection:
    """Takes over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, _IDLE_SECONDS),
            (socket.TCP_KEEPINTVL, _INTERVAL_SECONDS),
            (socket.TCP_KEEPCNT, _PROBES),
            (socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection = connection
        self._inbox = FrameDecoder()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._connection.fileno()

    @property
    def local_address(self) -> str:
        """This host's address on it."""
        return str(self._connection.getsockname()[0])

    @property
    def unsent(self) -> bool:
        """Whether something waits for `flush`."""
        return bool(self._unsent)

    @property
    def has_unacked_data(self) -> bool:
        """Whether the other host has yet to confirm something that was sent: its kernel does that, whatever the process does."""
        try:
            waiting = fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4))
        except OSError:  # it has ended
            return False
        return int.from_bytes(waiting, sys.byteorder) > 0

    def allow_frames(self, most_body: int) -> None:
        """Take frames with bodies of up to ``most_body`` bytes from now on."""
        self._inbox.most_body = most_body

    def send(self, frame: Frame) -> None:
        """Send ``frame``, or keep what of it can't be sent yet.

        A peer that takes nothing is told of by its silence: what it would not take anyway is dropped.
        """
        if len(self._unsent) <= _MOST_UNSENT:
            self._unsent += frame.pack()
            self.flush()

    def flush(self) -> None:
        """Send what is left. That the connection has ended is for `read` to say."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def read(self) -> list[Frame]:
        """Return the frames that have come.

        Raises:
            ClosedError: there will be no more.
            WireError: what came is not of this protocol.
        """
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ClosedError(lost=error.errno in _UNREACHABLE) from None
        if not data:
            raise ClosedError(lost=False)
        return list(self._inbox.feed(data))

    def close(self) -> None:
        """Close it."""
        self._connection.close()


class Waker:
    """Wakes a thread that waits in a selector, from any other."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake it."""
        try:
            self._writer.send(b"\0")
        except OSError:  # full: it is awake already; closed: it has ended
            return

    def clear(self) -> None:
        """Take note: until the next ring."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give both ends back."""
        self._reader.close()
        self._writer.close()
