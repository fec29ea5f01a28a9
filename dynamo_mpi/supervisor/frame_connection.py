# SPDX-License-Identifier: Apache-2.0
"""A non-blocking TCP connection that carries frames; TCP keepalive detects a lost peer host."""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import termios

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.supervisor.heartbeat_protocol import FrameDecoder

if TYPE_CHECKING:
    from dynamo_mpi.supervisor.heartbeat_protocol import Frame

_READ_BYTES = 1 << 16
_MAX_UNSENT_BYTES = 1 << 18
# a lost host is detected within about 20 s, whether or not data is being sent to it
_IDLE_SECONDS, _INTERVAL_SECONDS, _PROBES = 5, 5, 3
_USER_TIMEOUT_MS = 20_000
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class ClosedError(Exception):
    """The connection has closed.

    Args:
        lost: the other host doesn't answer, so the state of the process there is unknown.
    """

    def __init__(self, *, lost: bool) -> None:
        super().__init__("the host does not answer" if lost else "closed")
        self.lost = lost


class FrameConnection:
    """A connection that sends and receives frames without blocking. Takes ownership of a connected socket."""

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
        self._decoder = FrameDecoder()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """Return the file descriptor, for a selector."""
        return self._connection.fileno()

    @property
    def local_address(self) -> str:
        """This host's address of the connection."""
        return str(self._connection.getsockname()[0])

    @property
    def unsent(self) -> bool:
        """Whether data waits for `flush`."""
        return bool(self._unsent)

    @property
    def has_unacked_data(self) -> bool:
        """Whether sent data is not yet acknowledged by the other host, whose kernel does that whatever the process does."""
        try:
            waiting = fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4))
        except OSError:  # the connection has closed
            return False
        return int.from_bytes(waiting, sys.byteorder) > 0

    def allow_frames(self, max_body: int) -> None:
        """From now on, accept frames with bodies of up to ``max_body`` bytes."""
        self._decoder.max_body = max_body

    def send(self, frame: Frame) -> None:
        """Send ``frame``; keep what can't be sent yet.

        If the peer reads nothing, further frames are dropped: the heartbeat timeout detects such a peer.
        """
        if len(self._unsent) <= _MAX_UNSENT_BYTES:
            self._unsent += frame.pack()
            self.flush()

    def flush(self) -> None:
        """Send what is left. Does not raise if the connection has closed: `read` does."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def read(self) -> list[Frame]:
        """Return the frames that have arrived.

        Raises:
            ClosedError: the connection has closed.
            WireError: the data is not of this protocol.
        """
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ClosedError(lost=error.errno in _UNREACHABLE) from None
        if not data:
            raise ClosedError(lost=False)
        return list(self._decoder.feed(data))

    def detach(self) -> socket.socket:
        """Give up the connection, and return its socket, which blocks. Nothing must be unsent, nor received and not yet returned."""
        self._connection.setblocking(True)
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Silence:
    """Notices that a connection's other host acknowledges nothing. For a process that hangs its kernel does.

    Args:
        connection: the connection.
        seconds: so long must nothing be acknowledged.
    """

    def __init__(self, connection: FrameConnection, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._since: float | None = None
        self._is_known = False

    def forget(self) -> None:
        """Begin anew: this process itself stood still."""
        self._since = None

    def noticed(self, now: float) -> float:
        """Return once for how long it has lasted, else 0. Call it before each heartbeat: what was just sent can't be acknowledged yet."""
        if not self._connection.has_unacked_data:
            self._since, self._is_known = None, False
            return 0.0
        self._since = now if self._since is None else self._since
        if self._is_known or now - self._since < self._seconds:
            return 0.0
        self._is_known = True
        return now - self._since


class Waker:
    """Wakes a thread that waits in a selector. Thread-safe."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake the thread."""
        try:
            self._writer.send(b"\0")
        except OSError:  # full: the thread is awake already; closed: it has ended
            return

    def clear(self) -> None:
        """Make the descriptor unreadable until the next `wake`."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()
