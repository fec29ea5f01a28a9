# SPDX-License-Identifier: Apache-2.0
"""How the node agents of a world talk to each other: over TCP, with the proofs and frames of the liveness connections, in JSON.

Rank 0's agent is the hub. All others connect to it, and to its deputy: the first that came, which takes over where the hub, and so maybe
its whole node, is lost. Each agent is known by the lowest rank of its node.
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
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection, Waker
from dynamo_mpi.supervisor.heartbeat_client import connect
from dynamo_mpi.supervisor.heartbeat_protocol import MOST_BODY, Frame, FrameType, WireError
from dynamo_mpi.supervisor.join import MAX_PENDING, JoinHandler
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HUB = 0
_AGAIN_SECONDS = 0.2
_CONNECT_SECONDS = 2.0


class AgentNetwork:
    """This agent's connections. All of it runs in the thread that owns the selector, but for the connecting.

    Args:
        selector: each entry's data is what to call.
        node: this agent's number.
        token: what all agents of this world know.
        on_message: called with the number of the agent that has sent it, and the message.
        on_lost: called with the number of an agent whose connection has ended.
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
        self._bell = Waker()
        self._reception: JoinHandler | None = None
        self._lines: dict[int, FrameConnection] = {}
        self._places: dict[int, Sequence[Rendezvous]] = {}
        self._joined: queue.SimpleQueue[tuple[int, FrameConnection, list[Frame]]] = queue.SimpleQueue()
        self._closed = False
        selector.register(self._bell, selectors.EVENT_READ, self._adopt)

    @property
    def agents(self) -> list[int]:
        """The agents that are connected, in the order in which they came."""
        return list(self._lines)

    def listen(self, listener: socket.socket) -> None:
        """Let other agents in at a listening socket, in place of one before."""
        if self._reception is not None:
            self._reception.close()
        self._reception = JoinHandler(
            self._selector, listener, bytes.fromhex(self._token), MAX_PENDING, self._admit, self._greet, again=True
        )

    def connect(self, to: int, host: str, addresses: Sequence[str], port: int) -> None:
        """Connect to an agent, in a thread, until it answers, it is to be found at another place, or this is closed.

        Args:
            to: its number.
            host: its node.
            addresses: where it listens, as far as this host can reach them; tried one after the other.
            port: the same.
        """
        meetings = [Rendezvous(host, address, port, self._token) for address in addresses]
        self._places[to] = meetings
        with contextlib.suppress(RuntimeError):  # no more threads for this user: this node's agent is alone, then
            threading.Thread(target=self._connect, args=(to, meetings), name="agents", daemon=True).start()

    def send(self, to: int, message: dict[str, Any]) -> bool:
        """Send an agent a message, and return whether there is a connection to it. Never waits."""
        line = self._lines.get(to)
        if line is None:
            return False
        with contextlib.suppress(WireError):  # too long a message is no reason to stop watching
            line.send(Frame(FrameType.AGENT, json.dumps(message).encode()))
        return True

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send a message to all agents that are connected."""
        for number in self.agents:
            self.send(number, message)

    def address_of(self, number: int) -> str:
        """Return this host's address on the connection to an agent; empty where there is none."""
        line = self._lines.get(number)
        return "" if line is None else line.local_address

    def wake(self) -> None:
        """Have the loop turn once. Thread-safe."""
        self._bell.wake()

    def tick(self) -> None:
        """Do what is due now and then."""
        if self._reception is not None:
            self._reception.tick()
        for line in self._lines.values():
            line.flush()

    def flush(self, seconds: float) -> None:
        """Wait until all is sent, but no longer than this."""
        end = time.monotonic() + seconds
        for line in self._lines.values():
            while line.unsent and time.monotonic() < end:
                line.flush()
                time.sleep(_AGAIN_SECONDS / 100)

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        if self._reception is not None:
            self._reception.close()
        for line in self._lines.values():
            line.close()
        self._lines = {}

    def _connect(self, to: int, meetings: Sequence[Rendezvous]) -> None:
        for meeting in itertools.cycle(meetings):
            if self._closed or self._places.get(to) is not meetings:
                return
            with contextlib.suppress(DynamoMpiError, OSError):
                line, early = connect(meeting, self._node, _CONNECT_SECONDS)
                self._joined.put((to, line, early))
                self._bell.wake()
                return
            if meeting is meetings[-1]:
                time.sleep(_AGAIN_SECONDS)

    def _adopt(self) -> None:
        self._bell.clear()
        while not self._joined.empty():
            number, line, early = self._joined.get()
            if number in self._lines:  # by another address
                line.close()
                continue
            line.allow_frames(MOST_BODY)
            self._add(number, line)
            self._on_message(number, {"joined": True})
            self._take(number, early)

    def _admit(self, number: int, line: FrameConnection) -> bool:
        line.allow_frames(MOST_BODY)
        if (before := self._lines.pop(number, None)) is not None:
            # its successor, after it has ended
            self._selector.unregister(before)
            before.close()
        self._add(number, line)
        return True

    def _greet(self, number: int) -> None:
        self._on_message(number, {"joined": True})

    def _add(self, number: int, line: FrameConnection) -> None:
        self._lines[number] = line
        self._selector.register(line, selectors.EVENT_READ, lambda: self._read(number, line))

    def _read(self, number: int, line: FrameConnection) -> None:
        if self._lines.get(number) is not line:  # closed in the same round
            return
        try:
            frames = line.read()
        except (ClosedError, WireError):
            self._selector.unregister(line)
            line.close()
            del self._lines[number]
            self._on_lost(number)
            return
        self._take(number, frames)

    def _take(self, number: int, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.kind is not FrameType.AGENT:
                continue
            try:
                message = json.loads(frame.body)
            except ValueError:
                continue
            if isinstance(message, dict):
                self._on_message(number, message)
