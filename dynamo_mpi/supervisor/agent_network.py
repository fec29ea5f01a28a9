# SPDX-License-Identifier: Apache-2.0
"""Connects the node agents of a world over TCP: JSON messages in the authenticated frames of the heartbeat connections.

Rank 0's agent is the hub. All other agents connect to it and to its deputy, the first agent that joined, which takes over if the hub, maybe
with its whole node, is lost. Each agent's number is the lowest rank of its node.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import selectors
import socket
import threading
import time

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection, Waker
from dynamo_mpi.supervisor.heartbeat_protocol import MAX_BODY, Frame, FrameType, WireError
from dynamo_mpi.supervisor.join import JoinHandler, connect
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 2.0


class AgentNetwork:
    """This agent's connections to other agents. Everything runs in the thread that owns the selector, except connection attempts.

    Args:
        selector: the data of each entry is the function to call.
        node: this agent's number.
        token: the secret of all agents of this world.
        on_message: called with the sender's number and its message.
        on_lost: called with the number of an agent whose connection has closed.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        node: int,
        token: str,
        on_message: Callable[[int, dict[str, Any]], None],
        on_lost: Callable[[int], None],
    ) -> None:
        self._selector, self._node, self._token = selector, node, token
        self._on_message, self._on_lost = on_message, on_lost
        self._waker = Waker()
        self._join_handler: JoinHandler | None = None
        self._connections: dict[int, FrameConnection] = {}
        self._addresses: dict[int, Sequence[Rendezvous]] = {}
        self._joined: queue.SimpleQueue[tuple[int, FrameConnection, list[Frame]]] = queue.SimpleQueue()
        self._closed = False
        selector.register(self._waker, selectors.EVENT_READ, self._add_outgoing)

    @property
    def agents(self) -> list[int]:
        """The connected agents, in the order in which they joined."""
        return list(self._connections)

    def listen(self, listener: socket.socket) -> None:
        """Accept other agents on a listening socket, which replaces an earlier one."""
        if self._join_handler is not None:
            self._join_handler.close()
        self._join_handler = JoinHandler(
            self._selector,
            listener,
            bytes.fromhex(self._token),
            None,
            self._admit,
            self._on_joined,
        )

    def connect(self, node: int, host: str, addresses: Sequence[str], port: int) -> None:
        """Try to connect to an agent, in a thread, until it answers, this is called again for it, or the network is closed.

        Args:
            node: the agent's number.
            host: the agent's host.
            addresses: the agent's addresses; tried one after the other.
            port: the port on which it listens.
        """
        candidates = [Rendezvous(host, address, port, self._token) for address in addresses]
        self._addresses[node] = candidates
        with contextlib.suppress(RuntimeError):  # thread limit of this user reached: this agent stays alone
            threading.Thread(target=self._connect, args=(node, candidates), name="agents", daemon=True).start()

    def send(self, node: int, message: dict[str, Any]) -> bool:
        """Send an agent a message, and return whether there is a connection to it. Never waits."""
        connection = self._connections.get(node)
        if connection is None:
            return False
        with contextlib.suppress(WireError):  # too long a message must not stop the agent
            connection.send(Frame(FrameType.AGENT, json.dumps(message).encode()))
        return True

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send a message to all connected agents."""
        for number in self.agents:
            self.send(number, message)

    def address_of(self, number: int) -> str:
        """Return this host's address on the connection to an agent; empty if there is no connection."""
        connection = self._connections.get(number)
        return "" if connection is None else connection.local_address

    def wake(self) -> None:
        """Wake the thread that owns the selector. Thread-safe."""
        self._waker.wake()

    def tick(self) -> None:
        """Do the periodic work."""
        if self._join_handler is not None:
            self._join_handler.tick()
        for connection in self._connections.values():
            connection.flush()

    def flush(self, seconds: float) -> None:
        """Wait until everything is sent, at most ``seconds``."""
        end = time.monotonic() + seconds
        for connection in self._connections.values():
            while connection.unsent and time.monotonic() < end:
                connection.flush()
                time.sleep(_RETRY_SECONDS / 100)

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        if self._join_handler is not None:
            self._join_handler.close()
        for connection in self._connections.values():
            connection.close()
        self._connections = {}

    def _connect(self, node: int, candidates: Sequence[Rendezvous]) -> None:
        for candidate in itertools.cycle(candidates):
            if self._closed or self._addresses.get(node) is not candidates:
                return
            with contextlib.suppress(DynamoMpiError, OSError):
                connection, early = connect(candidate, self._node, _CONNECT_SECONDS)
                self._joined.put((node, connection, early))
                self._waker.wake()
                return
            if candidate is candidates[-1]:
                time.sleep(_RETRY_SECONDS)

    def _add_outgoing(self) -> None:
        self._waker.clear()
        while not self._joined.empty():
            number, connection, early = self._joined.get()
            if number in self._connections:  # already connected by another address
                connection.close()
                continue
            connection.allow_frames(MAX_BODY)
            self._add(number, connection)
            self._on_message(number, {"joined": True})
            self._dispatch(number, early)

    def _admit(self, number: int, connection: FrameConnection) -> bool:
        connection.allow_frames(MAX_BODY)
        if (previous := self._connections.pop(number, None)) is not None:
            # this is the successor of an agent that has exited
            self._selector.unregister(previous)
            previous.close()
        self._add(number, connection)
        return True

    def _on_joined(self, number: int) -> None:
        self._on_message(number, {"joined": True})

    def _add(self, number: int, connection: FrameConnection) -> None:
        self._connections[number] = connection
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(number, connection))

    def _read(self, number: int, connection: FrameConnection) -> None:
        if self._connections.get(number) is not connection:  # closed in the same round
            return
        try:
            frames = connection.read()
        except (ClosedError, WireError):
            self._selector.unregister(connection)
            connection.close()
            del self._connections[number]
            self._on_lost(number)
            return
        self._dispatch(number, frames)

    def _dispatch(self, number: int, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.kind is not FrameType.AGENT:
                continue
            try:
                message = json.loads(frame.body)
            except ValueError:
                continue
            if isinstance(message, dict):
                self._on_message(number, message)
