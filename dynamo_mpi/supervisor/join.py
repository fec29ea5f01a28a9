# SPDX-License-Identifier: Apache-2.0
"""Who connects to rank 0 is a stranger until it has proven to be a rank; strangers are few, and don't stay long."""

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

_PATIENCE_SECONDS = 5.0
MAX_PENDING = 64
"""Strangers that may be there beside the ranks."""
_MOST_AT_ONCE = 64


class _PendingConnection(NamedTuple):
    line: FrameConnection
    nonce: bytes
    end: float
    hear: Callable[[], None]


class JoinHandler:
    """Lets ranks in. All of it runs in the thread that owns the selector, where each entry's data is what to call.

    Args:
        selector: the lookout's.
        listener: where ranks come.
        token: what they have to know.
        size: ranks of the world; as many may be on their way at once as have not come yet, and a few strangers.
        admit: called with the number and the line of each rank that has proven itself; returns whether that one was due.
        greeted: called with its number once it has been answered.
        again: each may come more than once.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        token: bytes,
        size: int,
        admit: Callable[[int, FrameConnection], bool],
        greeted: Callable[[int], None] = lambda _: None,
        *,
        again: bool = False,
    ) -> None:
        self._selector, self._listener, self._token = selector, listener, token
        self._room, self._admit, self._greeted, self._again = size + MAX_PENDING, admit, greeted, again
        self._strangers: dict[int, _PendingConnection] = {}
        listener.setblocking(False)
        self._open = False
        self.tick()

    def tick(self) -> None:
        """Send those away who have had their time, and listen again where that had to be interrupted."""
        now = time.monotonic()
        for stranger in [stranger for stranger in self._strangers.values() if now > stranger.end]:
            self._drop(stranger).close()
        if not self._open:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._open = True

    def close(self) -> None:
        """Send all strangers away, and listen no longer."""
        for stranger in list(self._strangers.values()):
            self._drop(stranger).close()
        if self._open:
            self._selector.unregister(self._listener)
            self._open = False
        self._listener.close()

    def _accept(self) -> None:
        if not self._open:  # closed in the same round
            return
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # gone before it was let in
                continue
            except OSError:  # out of descriptors, say: it would be readable for ever, so not before the next tick
                self._selector.unregister(self._listener)
                self._open = False
                return
            if len(self._strangers) >= self._room:
                connection.close()
                continue
            self._handshake(FrameConnection(connection))

    def _handshake(self, line: FrameConnection) -> None:
        number = line.fileno()
        stranger = _PendingConnection(
            line, secrets.token_bytes(NONCE_BYTES), time.monotonic() + _PATIENCE_SECONDS, lambda: self._receive(number)
        )
        self._strangers[number] = stranger
        self._selector.register(line, selectors.EVENT_READ, stranger.hear)
        line.send(Frame(FrameType.HELLO, stranger.nonce))

    def _receive(self, number: int) -> None:
        stranger = self._strangers.get(number)
        if stranger is None:  # dropped by what came before it in the same round
            return
        try:
            frames = stranger.line.read()
            if not frames:
                return
            # a rank waits for our proof before it says more
            (frame,) = frames
            join = Join.unpack(frame.body if frame.kind is FrameType.JOIN else b"")
        except (ClosedError, WireError, ValueError):
            self._drop(stranger).close()
            return
        line = self._drop(stranger)
        right = rank_mac(self._token, stranger.nonce, join.rank, join.nonce)
        if not is_valid_mac(join.proof, right) or not self._admit(join.rank, line):
            line.close()
            return
        if not self._again:
            self._room -= 1
        line.send(Frame(FrameType.WELCOME, leader_mac(self._token, join.nonce, join.rank)))
        self._greeted(join.rank)

    def _drop(self, stranger: _PendingConnection) -> FrameConnection:
        self._selector.unregister(stranger.line)
        del self._strangers[stranger.line.fileno()]
        return stranger.line
