# SPDX-License-Identifier: Apache-2.0
"""Authenticates connections to rank 0. The number of unauthenticated connections and their duration are limited."""

from __future__ import annotations

import secrets
import selectors
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection
from dynamo_mpi.supervisor.heartbeat_protocol import (
    NONCE_BYTES,
    Frame,
    FrameType,
    Join,
    WireError,
    is_valid_mac,
    leader_mac,
    rank_mac,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_HANDSHAKE_SECONDS = 5.0
MAX_PENDING = 64
"""Unauthenticated connections that are allowed beside those of the ranks."""
_MAX_ACCEPTS_PER_EVENT = 64


class _PendingConnection(NamedTuple):
    connection: FrameConnection
    nonce: bytes
    deadline: float
    on_readable: Callable[[], None]


class JoinHandler:
    """Accepts and authenticates ranks. Everything runs in the thread that owns the selector; the data of each entry is the function to call.

    Args:
        selector: the server's selector.
        listener: the listening socket.
        token: the secret that ranks must know.
        size: ranks of the world: at most as many connections as ranks are missing, and `MAX_PENDING` more, may be unauthenticated.
        admit: called with the number and the connection of each authenticated rank; returns whether it was expected.
        on_joined: called with a rank's number after WELCOME has been sent to it.
        may_rejoin: whether each rank may join more than once.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        token: bytes,
        size: int,
        admit: Callable[[int, FrameConnection], bool],
        on_joined: Callable[[int], None] = lambda _: None,
        *,
        may_rejoin: bool = False,
    ) -> None:
        self._selector, self._listener, self._token = selector, listener, token
        self._capacity, self._admit, self._on_joined, self._may_rejoin = (
            size + MAX_PENDING,
            admit,
            on_joined,
            may_rejoin,
        )
        self._pending: dict[int, _PendingConnection] = {}
        listener.setblocking(False)
        self._open = False
        self.tick()

    def tick(self) -> None:
        """Drop connections that took too long to authenticate, and listen again if that was interrupted."""
        now = time.monotonic()
        for pending in [pending for pending in self._pending.values() if now > pending.deadline]:
            self._drop(pending).close()
        if not self._open:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._open = True

    def close(self) -> None:
        """Drop all unauthenticated connections and stop listening."""
        for pending in list(self._pending.values()):
            self._drop(pending).close()
        if self._open:
            self._selector.unregister(self._listener)
            self._open = False
        self._listener.close()

    def _accept(self) -> None:
        if not self._open:  # closed in the same round
            return
        for _ in range(_MAX_ACCEPTS_PER_EVENT):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # closed before it was accepted
                continue
            except (
                OSError
            ):  # for instance no free descriptors: the socket would stay readable, so pause until the next tick
                self._selector.unregister(self._listener)
                self._open = False
                return
            if len(self._pending) >= self._capacity:
                connection.close()
                continue
            self._handshake(FrameConnection(connection))

    def _handshake(self, connection: FrameConnection) -> None:
        number = connection.fileno()
        pending = _PendingConnection(
            connection,
            secrets.token_bytes(NONCE_BYTES),
            time.monotonic() + _HANDSHAKE_SECONDS,
            lambda: self._receive(number),
        )
        self._pending[number] = pending
        self._selector.register(connection, selectors.EVENT_READ, pending.on_readable)
        connection.send(Frame(FrameType.HELLO, pending.nonce))

    def _receive(self, number: int) -> None:
        pending = self._pending.get(number)
        if pending is None:  # dropped earlier in the same round
            return
        try:
            frames = pending.connection.read()
            if not frames:
                return
            # a rank waits for WELCOME before it sends more
            (frame,) = frames
            join = Join.unpack(frame.body if frame.kind is FrameType.JOIN else b"")
        except (ClosedError, WireError, ValueError):
            self._drop(pending).close()
            return
        connection = self._drop(pending)
        expected = rank_mac(self._token, pending.nonce, join.rank, join.nonce)
        if not is_valid_mac(join.mac, expected) or not self._admit(join.rank, connection):
            connection.close()
            return
        if not self._may_rejoin:
            self._capacity -= 1
        connection.send(Frame(FrameType.WELCOME, leader_mac(self._token, join.nonce, join.rank)))
        self._on_joined(join.rank)

    def _drop(self, pending: _PendingConnection) -> FrameConnection:
        self._selector.unregister(pending.connection)
        del self._pending[pending.connection.fileno()]
        return pending.connection
