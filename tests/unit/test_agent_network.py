# SPDX-License-Identifier: Apache-2.0
"""Node agents find each other: all connect to the hub, and a hub's successor hears them at the same socket. Real sockets on loopback."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dynamo_mpi.supervisor.agent_network import AgentNetwork
from dynamo_mpi.supervisor.agent_peers import HUB

TOKEN = "ab" * 32


class Agent:
    """A network in a loop of its own, turned by hand."""

    def __init__(self, node: int, token: str = TOKEN) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[tuple[int, dict[str, Any]]] = []
        self.lost: list[int] = []
        self.network = AgentNetwork(self.selector, node, token, self.take, self.lost.append)

    def take(self, number: int, message: dict[str, Any]) -> None:
        self.heard.append((number, message))

    def turn(self) -> None:
        for key, _ in self.selector.select(0.01):
            key.data()
        self.network.tick()

    def joined(self) -> list[int]:
        return [number for number, message in self.heard if message.get("joined")]


def turn_until(agents: list[Agent], condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [agent.heard for agent in agents]
        for agent in agents:
            agent.turn()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def make() -> Iterator[Callable[..., Agent]]:
    """Make agents; their connections are closed."""
    with ExitStack() as stack:

        def one(node: int, token: str = TOKEN) -> Agent:
            agent = Agent(node, token)
            stack.callback(agent.network.close)
            return agent

        yield one


def test_messages_go_both_ways_and_an_end_is_seen(listener: socket.socket, make: Callable[..., Agent]) -> None:
    hub, spoke = make(0), make(4)
    hub.network.listen(listener.dup())
    spoke.network.connect(HUB, "h1", ["127.0.0.1"], listener.getsockname()[1])
    turn_until([hub, spoke], lambda: hub.joined() == [4] and spoke.joined() == [HUB])
    assert spoke.network.address_of(HUB) == "127.0.0.1"
    hub.network.broadcast({"phase": "serve"})
    spoke.network.send(HUB, {"failure": "x" * 60000})
    turn_until([hub, spoke], lambda: (HUB, {"phase": "serve"}) in spoke.heard and len(hub.heard) == 2)
    assert hub.heard[1] == (4, {"failure": "x" * 60000})
    spoke.network.close()
    turn_until([hub], lambda: hub.lost == [4])
    assert not hub.network.send(4, {})


def test_the_successor_of_a_hub_hears_those_that_connect_again(
    listener: socket.socket, make: Callable[..., Agent]
) -> None:
    hub, spoke = make(0), make(4)
    hub.network.listen(listener.dup())
    spoke.network.connect(HUB, "h1", ["127.0.0.1"], listener.getsockname()[1])
    turn_until([hub, spoke], hub.joined)
    hub.network.close()
    turn_until([spoke], lambda: spoke.lost == [HUB])
    spoke.network.connect(HUB, "h1", ["127.0.0.1"], listener.getsockname()[1])
    successor = make(0)
    successor.network.listen(listener.dup())
    turn_until([successor, spoke], lambda: successor.joined() and spoke.joined() == [HUB, HUB])
    assert spoke.joined() == [HUB, HUB]


def test_who_does_not_know_the_token_is_not_let_in(listener: socket.socket, make: Callable[..., Agent]) -> None:
    hub, spoke, stranger = make(0), make(4), make(5, "cd" * 32)
    hub.network.listen(listener.dup())
    stranger.network.connect(HUB, "h1", ["127.0.0.1"], listener.getsockname()[1])
    spoke.network.connect(HUB, "h1", ["127.0.0.1"], listener.getsockname()[1])
    turn_until([hub, spoke, stranger], hub.joined)
    assert hub.network.agents == [4]
    assert stranger.heard == []
