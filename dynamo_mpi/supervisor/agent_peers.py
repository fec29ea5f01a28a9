# SPDX-License-Identifier: Apache-2.0
"""A node agent's place among the agents of its world: the hub, which is rank 0's agent, its deputy, or one of the others.

The hub makes the first agent that joins its deputy. All agents connect to both; the deputy replaces the hub if that is lost.
"""

from __future__ import annotations

import contextlib
import socket
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import selectors
    from collections.abc import Sequence

    from dynamo_mpi.supervisor.agent_network import AgentNetwork

HUB = 0
"""The hub's number."""
_FLUSH_SECONDS = 0.5


class LostAgent(NamedTuple):
    """An agent whose connection has closed and that no successor has replaced.

    Args:
        number: its number, the lowest rank of its node.
        host: its node.
        at: when that was noticed, in seconds of the monotonic clock.
    """

    number: int
    host: str
    at: float


class PeerEvents(Protocol):
    """What an agent does about the others."""

    def greet(self, number: int) -> None:
        """Send an agent that has joined what it must know."""

    def on_message(self, number: int, message: dict[str, Any]) -> None:
        """Handle a message, which may have any keys."""

    def on_peer_lost(self, number: int) -> bool:
        """Handle the loss of the connection to an agent; return whether it must be replaced."""


class AgentPeers:
    """The other agents. Everything runs in the thread that owns the selector. Without a network, nothing is sent.

    Args:
        selector: the agent's selector.
        host: this node.
        events: is called about the others.

    Attributes:
        is_hub: whether this is rank 0's agent.
        is_deputy: whether this agent replaces the hub if that is lost.
    """

    def __init__(self, selector: selectors.BaseSelector, host: str, events: PeerEvents) -> None:
        self._selector, self._host, self._events = selector, host, events
        self.is_hub = self.is_deputy = False
        self._network: AgentNetwork | None = None
        self._listener: socket.socket | None = None
        self._hub_endpoint: tuple[str, Sequence[str], int] = "", (), 0
        # on the hub: the deputy's number and endpoint, which arrives with its answer
        self._deputy: tuple[int, dict[str, Any]] | None = None
        self._own_endpoint: dict[str, Any] = {}
        self._leases = ""
        self._hosts: dict[int, str] = {}
        self._lost_at: dict[int, float] = {}

    @property
    def exist(self) -> bool:
        """Whether this agent is, or will be, connected to others."""
        return self._network is not None

    @property
    def agents(self) -> list[int]:
        """Numbers of the connected agents."""
        return [] if self._network is None else self._network.agents

    @property
    def hub_host(self) -> str:
        """The hub's node; empty if this agent isn't connected to others."""
        return self._hub_endpoint[0]

    @property
    def has_hub(self) -> bool:
        """Whether the hub is connected."""
        return HUB in self.agents

    @property
    def lost(self) -> list[LostAgent]:
        """The agents that are lost and not replaced, in the order in which they were lost."""
        return [LostAgent(number, self._hosts.get(number, ""), at) for number, at in self._lost_at.items()]

    def listen(self, listener: socket.socket) -> None:
        """Accept other agents on this socket, now or when the network is joined."""
        self._listener = listener
        if self._network is not None:
            self._network.listen(listener)

    def join(self, node: int, token: str, host: str, addresses: Sequence[str], port: int) -> None:
        """Join the network, or use another endpoint of the hub.

        Args:
            node: this agent's number.
            token: the secret of all agents of this world.
            host: the hub's node.
            addresses: the hub's addresses.
            port: the hub's port.
        """
        previous, self._hub_endpoint = self._hub_endpoint, (host, addresses, port)
        if self._network is not None:
            if not (self.is_hub or self.has_hub) and previous != self._hub_endpoint:
                self._network.connect(HUB, *self._hub_endpoint)
            return
        # half of what an agent imports, and no agent of a single node needs it: imports delay the watch
        from dynamo_mpi.supervisor.agent_network import AgentNetwork

        self._network = AgentNetwork(self._selector, node, token, self._on_message, self._on_lost)
        if not self.is_hub:
            self._network.connect(HUB, *self._hub_endpoint)
        elif self._listener is not None:
            self._network.listen(self._listener)

    def send(self, number: int, message: dict[str, Any]) -> None:
        """Send a message to an agent."""
        if self._network is not None:
            self._network.send(number, message)

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send a message to all connected agents."""
        if self._network is not None:
            self._network.broadcast(message)

    def send_to_deputy(self, message: dict[str, Any]) -> None:
        """Send a message to the deputy, if this is the hub and there is one."""
        if self._deputy is not None:
            self.send(self._deputy[0], message)

    def set_leases(self, encoded: str) -> None:
        """Send the leases that the worker owns to the deputy, and to each later one."""
        self._leases = encoded
        self.send_to_deputy({"leases": encoded})

    def wake(self) -> None:
        """Wake the agent's thread. Thread-safe."""
        if self._network is not None:
            self._network.wake()

    def tick(self) -> None:
        """Do the periodic work."""
        if self._network is not None:
            self._network.tick()

    def close(self) -> None:
        """Send what is left, and close all connections."""
        if self._network is not None:
            self._network.flush(_FLUSH_SECONDS)
            self._network.close()

    def _on_message(self, number: int, message: dict[str, Any]) -> None:
        """Handle a message of another agent; agents of other versions may send other keys, so each key is checked."""
        if message.get("joined"):
            self._lost_at.pop(number, None)
            self.send(number, {"host": self._host})
            self._on_joined(number)
        if isinstance(host := message.get("host"), str):
            self._hosts[number] = host
        if message.get("deputy"):
            self._become_deputy()
        elif "deputy" in message:
            self.is_deputy = False
        if isinstance(endpoint := message.get("listens"), dict):
            self._set_deputy(number, endpoint)
        if isinstance(at := message.get("deputy_at"), list) and len(at) == 2 and not self.is_deputy:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                if self._network is not None:
                    self._network.connect(int(at[0]), at[1]["host"], [at[1]["address"]], at[1]["port"])
        self._events.on_message(number, message)

    def _on_joined(self, number: int) -> None:
        if not self.is_hub:
            if self.is_deputy and number == HUB:
                self.send(HUB, {"listens": self._own_endpoint})
            self._events.greet(number)
            return
        self._events.greet(number)
        if self._deputy is None:
            self._deputy = number, {}
            self.send(number, {"deputy": True, "leases": self._leases})
        elif self._deputy[1]:
            self.send(number, {"deputy_at": list(self._deputy)})

    def _set_deputy(self, number: int, endpoint: dict[str, Any]) -> None:
        if self._deputy is not None and self._deputy[0] != number:
            # a new hub may have chosen another deputy before the existing one joined
            self.send(self._deputy[0], {"deputy": False})
        self._deputy = number, endpoint
        self.send(number, {"leases": self._leases})
        for other in self.agents:
            if other != number:
                self.send(other, {"deputy_at": [number, endpoint]})

    def _become_deputy(self) -> None:
        if self._network is None:
            return
        if self.is_deputy:
            # a new hub doesn't know the endpoint
            self.send(HUB, {"listens": self._own_endpoint})
            return
        self.is_deputy = True
        address = self._network.address_of(HUB)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            listener = socket.create_server((address, 0), family=family, backlog=128)
            self._network.listen(listener)
            self._own_endpoint = {"host": self._host, "address": address, "port": listener.getsockname()[1]}
            self.send(HUB, {"listens": self._own_endpoint})

    def _on_lost(self, number: int) -> None:
        self._lost_at[number] = time.monotonic()
        if self._network is None or not self._events.on_peer_lost(number):
            return
        if self.is_hub:
            if self._deputy is not None and number == self._deputy[0]:
                self._deputy = None
                if rest := self.agents:
                    self._on_joined(rest[0])
        elif number == HUB:
            # its successor will listen at the same endpoint
            self._network.connect(HUB, *self._hub_endpoint)
