# SPDX-License-Identifier: Apache-2.0
"""The connections between the nodes' helpers: authenticated as those of the heartbeats, then JSON lines, or extents.

Data streams carry extents from a node to its successor, each after a header, and on the way back the numbers of extents that the successor
needs no more. Nothing that is received is executed or unpickled; lengths are those of the receiver's own manifest.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.stage.manifest import StageError
from dynamo_mpi.supervisor.frame_connection import Waker
from dynamo_mpi.supervisor.join import JoinHandler, connect
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_mpi.supervisor.frame_connection import FrameConnection

CONTROL = 15
"""The number of a node's control connection; data streams are numbered from 0."""
_PLACES = 16
_MAX_LINE = 1 << 20
_TICK_SECONDS = 1.0
# a receiver whose disk is busy may read nothing for a while
_USER_TIMEOUT_MS = 120_000
_HEADER = struct.Struct("!IIH4s")
_NUMBER = struct.Struct("!I")
# the version of what follows; 1 had SHA-256
_GO = b"\2"


class Peer(NamedTuple):
    """Where a node's helper listens.

    Args:
        host: the node's name.
        address: its address.
        port: its port.
    """

    host: str
    address: str
    port: int


class ExtentHeader(NamedTuple):
    """What precedes an extent on a data stream.

    Args:
        extent: its number.
        length: its bytes.
        origin: the node that has read it, where its way ends.
        digest: of its bytes.
    """

    extent: int
    length: int
    origin: int
    digest: bytes

    def pack(self) -> bytes:
        """Encode it."""
        return _HEADER.pack(*self)


def read_header(stream: socket.socket) -> ExtentHeader | None:
    """Return the next header; None at the end of the stream."""
    data = read_exactly(stream, _HEADER.size)
    return ExtentHeader(*_HEADER.unpack(data)) if data else None


def pack_number(extent: int) -> bytes:
    """Encode the number of an extent that isn't needed any more."""
    return _NUMBER.pack(extent)


def read_number(stream: socket.socket) -> int | None:
    """Return the next such number; None at the end of the stream."""
    data = read_exactly(stream, _NUMBER.size)
    return int(_NUMBER.unpack(data)[0]) if data else None


def read_exactly(stream: socket.socket, size: int) -> bytes:
    """Return the next ``size`` bytes; nothing at the end of the stream.

    Raises:
        ConnectionError: the stream ends within them.
    """
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            if data:
                raise ConnectionError("the connection has closed in the middle of a message")
            return b""
        data += part
    return data


def send_ready(stream: socket.socket) -> None:
    """Let the node at the other end of a data stream send. Does not raise if it has closed: reading from it ends then."""
    with contextlib.suppress(OSError):
        stream.sendall(_GO)


def await_ready(stream: socket.socket) -> None:
    """Wait until the receiver can receive: it may make room for minutes, and TCP gives up a stream whose data it doesn't take.

    Raises:
        ConnectionError: it has closed instead, or is of another version.
    """
    if (answer := read_exactly(stream, len(_GO))) != _GO:
        raise ConnectionError("it is of another version" if answer else "it has closed")


def shut(stream: socket.socket) -> None:
    """End a stream, so that a thread that waits in it goes on."""
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


class LineChannel:
    """JSON lists, one a line, over a connected socket. Sending is thread-safe."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, *message: Any) -> None:
        """Send a list. Does not raise if the connection has closed: `receive` ends then."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self._stream.sendall(data)

    def receive(self) -> Iterator[list[Any]]:
        """Yield the lists that arrive until the connection closes or something else arrives."""
        rest = b""
        while True:
            try:
                data = self._stream.recv(1 << 16)
            except OSError:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    return
                if not isinstance(message, list) or not message:
                    return
                yield message
            if not data or len(rest) > _MAX_LINE:
                return

    def close(self) -> None:
        """Close the connection. Idempotent."""
        shut(self._stream)


class Listener:
    """Accepts the connections of other nodes' helpers, in a thread, until `close`.

    Args:
        listener: the listening socket.
        token: the secret of this world's helpers, hexadecimal.
        admit: called with the node, the number of the connection and its socket, in a thread of its own.
    """

    def __init__(self, listener: socket.socket, token: str, admit: Callable[[int, int, socket.socket], object]) -> None:
        self._admit = admit
        self._admitted: dict[int, FrameConnection] = {}
        self._selector, self._waker = selectors.DefaultSelector(), Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.clear)
        self._handler = JoinHandler(self._selector, listener, bytes.fromhex(token), None, self._keep, self._hand_over)
        self._closed = False
        threading.Thread(target=self._run, name="accept", daemon=True).start()

    def close(self) -> None:
        """Stop accepting."""
        self._closed = True
        self._waker.wake()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(_TICK_SECONDS):
                key.data()
            self._handler.tick()
        self._handler.close()

    def _keep(self, number: int, connection: FrameConnection) -> bool:
        self._admitted[number] = connection
        return True

    def _hand_over(self, number: int) -> None:
        stream = self._admitted.pop(number).detach()
        threading.Thread(target=self._begin, args=(number, stream), name="accept", daemon=True).start()

    def _begin(self, number: int, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            # the peer has received all frames then, so what follows needs no frame
            if stream.recv(1) == _GO:
                _prepare(stream)
                self._admit(*divmod(number, _PLACES), stream)
                return
        stream.close()


def connect_to(peer: Peer, token: str, node: int, number: int, seconds: float) -> socket.socket:
    """Connect to another node's helper.

    Args:
        peer: that helper.
        token: the secret of this world's helpers, hexadecimal.
        node: this node.
        number: the connection's number.
        seconds: the time limit.

    Raises:
        StageError: it can't be reached.
    """
    try:
        connection, _ = connect(Rendezvous(peer.host, peer.address, peer.port, token), node * _PLACES + number, seconds)
    except DynamoMpiError as error:
        raise StageError(
            f"the staging process on {peer.host} ({peer.address}) can't be reached: {error.problem}"
        ) from None
    stream = connection.detach()
    _prepare(stream)
    stream.sendall(_GO)
    return stream


def _prepare(stream: socket.socket) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
