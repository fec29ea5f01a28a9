# SPDX-License-Identifier: Apache-2.0
"""Both sides of a connection to rank 0, or to a node agent, until each has authenticated the other."""

from __future__ import annotations

import math
import secrets
import selectors
import socket
import time

from dynamo_mpi.common.admission import Admission
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.supervisor.failure_reports import cannot_connect
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MAX_BODY,
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
    from collections.abc import Callable

    from dynamo_mpi.supervisor.rendezvous import Rendezvous

_CONNECT_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_HANDSHAKE_SECONDS = 5.0
MAX_PENDING = 64
"""Unauthenticated connections that are allowed beside those of the ranks."""
_MAX_ACCEPTS_PER_EVENT = 64


class _PendingConnection(NamedTuple):
    connection: FrameConnection
    nonce: bytes
    on_readable: Callable[[], None]


class JoinHandler:
    """Accepts and authenticates ranks. Everything runs in the thread that owns the selector; the data of each entry is the function to call.

    Args:
        selector: the server's selector.
        listener: the listening socket.
        token: the secret that ranks must know.
        size: ranks of the world, each of which joins once: the listener is closed when all have joined. None if ranks may join again.
        admit: called with the number and the connection of each authenticated rank; returns whether it was expected.
        on_joined: called with a rank's number after WELCOME has been sent to it.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        token: bytes,
        size: int | None,
        admit: Callable[[int, FrameConnection], bool],
        on_joined: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._selector, self._listener, self._token = selector, listener, token
        self._admit, self._on_joined = admit, on_joined
        self._missing = math.inf if size is None else size - 1
        # all of a world's ranks may connect at once
        places = MAX_PENDING + (MAX_PENDING if size is None else size)
        self._admission: Admission[int] = Admission(places, _HANDSHAKE_SECONDS)
        self._pending: dict[int, _PendingConnection] = {}
        listener.setblocking(False)
        self._open = False
        self.tick()

    def tick(self) -> None:
        """Drop connections that took too long to authenticate, and listen again if that was interrupted."""
        for number in self._admission.expired(time.monotonic()):
            self._drop(self._pending[number]).close()
        if not self._open and self._missing:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._open = True

    def close(self) -> None:
        """Stop listening, and drop all unauthenticated connections."""
        if self._open:
            self._selector.unregister(self._listener)
            self._open = False
        self._listener.close()
        for pending in list(self._pending.values()):
            self._drop(pending).close()

    def _accept(self) -> None:
        if not self._open:  # closed in the same round
            return
        for _ in range(_MAX_ACCEPTS_PER_EVENT):
            try:
                connection, peer = self._listener.accept()
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
            self._handshake(FrameConnection(connection), peer[0])

    def _handshake(self, connection: FrameConnection, address: str) -> None:
        number = connection.fileno()
        displaced = self._admission.enter(number, address, time.monotonic())
        if number in displaced:
            connection.close()
            return
        for other in displaced:
            self._drop(self._pending[other]).close()
        pending = _PendingConnection(connection, secrets.token_bytes(NONCE_BYTES), lambda: self._receive(number))
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
                self._admission.begin_request(number, time.monotonic())
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
        connection.send(Frame(FrameType.WELCOME, leader_mac(self._token, join.nonce, join.rank)))
        self._on_joined(join.rank)
        self._missing -= 1
        if self._missing < math.inf:
            self._admission.places -= 1
        if not self._missing:
            self.close()

    def _drop(self, pending: _PendingConnection) -> FrameConnection:
        number = pending.connection.fileno()
        self._selector.unregister(pending.connection)
        self._admission.leave(number)
        del self._pending[number]
        return pending.connection


def connect(
    rendezvous: Rendezvous, rank: int, seconds: float = _CONNECT_SECONDS
) -> tuple[FrameConnection, list[Frame]]:
    """Connect and authenticate both sides; return the connection and the frames that rank 0 has sent since."""
    end = time.monotonic() + seconds
    while True:
        try:
            return _join(rendezvous, rank, end)
        except (OSError, ClosedError, WireError) as error:
            # retry: unauthenticated connections may have used up the capacity, or the system dropped one of hundreds of connections
            if time.monotonic() + _RETRY_SECONDS > end:
                raise cannot_connect(rendezvous, str(error)) from None
            time.sleep(_RETRY_SECONDS)


def _join(rendezvous: Rendezvous, rank: int, end: float) -> tuple[FrameConnection, list[Frame]]:
    token, nonce = bytes.fromhex(rendezvous.token), secrets.token_bytes(NONCE_BYTES)
    connection = FrameConnection(
        socket.create_connection((rendezvous.address, rendezvous.port), max(0.1, end - time.monotonic()))
    )
    try:
        hello, *_ = _await_frame(connection, FrameType.HELLO, end)
        connection.send(Frame(FrameType.JOIN, Join(rank, nonce, rank_mac(token, hello.body, rank, nonce)).pack()))
        connection.allow_frames(MAX_BODY)
        welcome, *early = _await_frame(connection, FrameType.WELCOME, end)
        if not is_valid_mac(welcome.body, leader_mac(token, nonce, rank)):
            raise WireError("the process that listens there is not rank 0 of this world")
    except BaseException:
        connection.close()
        raise
    return connection, early


def _await_frame(connection: FrameConnection, kind: FrameType, end: float) -> list[Frame]:
    """Wait for a frame of this kind and return it with the frames that arrived with it."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            if frames := connection.read():
                if frames[0].kind is not kind:
                    raise WireError(f"expected {kind.name}, received {frames[0].kind.name}")
                return frames
    raise TimeoutError("no answer in time")
