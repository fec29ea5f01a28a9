# SPDX-License-Identifier: Apache-2.0
"""Accepts HTTP connections in one thread, and starts another one only for a request whose head has arrived whole.

It runs in the node agent, beside the thread that watches the ranks, and both need the interpreter: a thread for each client that sends its
request byte by byte would delay the watch. Here such a client costs a connection, for a limited time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from dynamo_mpi.common.admission import Admission
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENT_SECONDS = 10.0
"""Time limit for a client to send its request, and for it to read the answer; a probe takes milliseconds."""
MAX_WAITING = 256
"""Connections whose request isn't whole."""
MAX_ANSWERING = 64
"""Requests that are being answered."""
_MAX_HEAD = 32 << 10
_MAX_ACCEPTS = 64
_CHECK_SECONDS = 0.5
_RETRY_SECONDS = 0.05
# edge-triggered: a part of a head stays in the socket until the rest has come
_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


class RequestListener:
    """Accepts connections, and has whole requests answered.

    Args:
        listener: the listening socket.
        answer: answers the request on a connection from an address, in a thread of its own.
    """

    def __init__(self, listener: socket.socket, answer: Callable[[socket.socket, Any], object]) -> None:
        listener.setblocking(False)
        self._listener, self._answer = listener, answer
        self._epoll = select.epoll()
        self._waiting: Admission[int] = Admission(MAX_WAITING, CLIENT_SECONDS)
        self._connections: dict[int, tuple[socket.socket, Any]] = {}
        self._answering: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._closing = False

    def run(self) -> None:
        """Accept connections until `close` is called."""
        self._epoll.register(self._listener, select.EPOLLIN)
        own, checked = self._listener.fileno(), time.monotonic()
        try:
            while not self._closing:
                for number, event in self._epoll.poll(_CHECK_SECONDS):
                    if number == own:
                        self._accept()
                    elif number in self._connections:
                        self._look(number, event)
                if time.monotonic() - checked > _CHECK_SECONDS:
                    checked = time.monotonic()
                    self._end_late(checked)
        finally:
            self._listener.close()
            for number in list(self._connections):
                self._take(number).close()
            with self._lock:
                for connection in self._answering:
                    _cut(connection)
            self._epoll.close()

    def close(self) -> None:
        """End `run`, at once, and all connections. From any thread."""
        self._closing = True
        with contextlib.suppress(OSError):
            # wakes it, and refuses connections although another process has inherited the socket
            self._listener.shutdown(socket.SHUT_RDWR)

    def release(self, connection: socket.socket) -> None:
        """Let an answer take as long as it takes, and not count any more. From any thread."""
        with self._lock:
            self._answering.pop(connection, None)

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # closed before it was accepted
                continue
            except OSError:  # for instance too many open files; the listener stays readable
                time.sleep(_RETRY_SECONDS)
                return
            number = connection.fileno()
            self._connections[number] = connection, address
            # what has arrived already is an event, too
            self._epoll.register(number, _EVENTS)
            for displaced in self._waiting.enter(number, address[0], time.monotonic()):
                self._take(displaced).close()

    def _look(self, number: int, event: int) -> None:
        """Look at what has arrived, without reading it: the thread that answers reads it."""
        connection, address = self._connections[number]
        try:
            head = connection.recv(_MAX_HEAD, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:
            self._take(number).close()
        elif event & (select.EPOLLRDHUP | select.EPOLLHUP) or _is_whole(head):
            self._start(self._take(number), address)
        elif len(head) == _MAX_HEAD:
            status = "431 Request Header Fields Too Large" if b"\n" in head else "414 URI Too Long"
            with contextlib.suppress(OSError):
                reply = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                connection.send(reply, socket.MSG_DONTWAIT)
            self._take(number).close()
        else:
            self._waiting.begin_request(number, time.monotonic())

    def _take(self, number: int) -> socket.socket:
        """Stop waiting for a connection's request, and return the connection."""
        connection, _ = self._connections.pop(number)
        self._epoll.unregister(number)
        self._waiting.leave(number)
        return connection

    def _start(self, connection: socket.socket, address: Any) -> None:
        with self._lock:
            has_room = len(self._answering) < MAX_ANSWERING
            if has_room:
                self._answering[connection] = time.monotonic()
        try:
            if has_room:
                threading.Thread(target=self._run_answer, args=(connection, address), name="http", daemon=True).start()
                return
        except RuntimeError:  # thread limit of this user reached
            self.release(connection)
        connection.close()

    def _run_answer(self, connection: socket.socket, address: Any) -> None:
        # any error: the client has disconnected, or its request is odd; the next one gets its answer
        with contextlib.suppress(Exception):
            self._answer(connection, address)
        self.release(connection)
        _cut(connection)
        connection.close()

    def _end_late(self, now: float) -> None:
        for number in self._waiting.expired(now):
            self._take(number).close()
        with self._lock:
            for connection, since in self._answering.items():
                if now - since > CLIENT_SECONDS:
                    # its thread continues, and closes it
                    _cut(connection)


def _is_whole(head: bytes) -> bool:
    return b"\n\r\n" in head or b"\n\n" in head or head.startswith((b"\r\n", b"\n"))


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
