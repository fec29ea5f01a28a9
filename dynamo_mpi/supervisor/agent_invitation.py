# SPDX-License-Identifier: Apache-2.0
"""Connects the node agents of a world's nodes as soon as MPI runs. Imported before the preflight result."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient

_MAX_ADDRESSES = 8
_TOKEN_BYTES = 32
# tried last: pods of one host may share it
LOOPBACK = "127.0.0.1"
_BARRIER_SECONDS = 5.0


def connect_agents(world: World, local_rank: int | None, client: NodeAgentClient, host: str) -> None:
    """Let the agents of all nodes connect to rank 0's agent. Collective.

    Args:
        world: all ranks.
        local_rank: this rank's number among the ranks of its node.
        client: this rank's connection to its node agent.
        host: this node.
    """
    text = world.broadcast(_listen_for_agents(client, host).encode() if world.rank == 0 else b"").decode()
    # one rank of each node, rank 0's node included
    if text and local_rank == 0:
        client.send(f"agents {text}")
    # after this barrier each agent knows where rank 0's agent listens, so a rank's exit is reported to it
    world.barrier(_BARRIER_SECONDS)


def _listen_for_agents(client: NodeAgentClient, host: str) -> str:
    """Listen for the agents of other nodes at all addresses of this host: which of them others can reach isn't known before preflight.

    Returns:
        Addresses, port and token, as one line; empty if there is no agent or no address to listen at.
    """
    import json
    import socket

    from dynamo_mpi.common.interfaces import host_networks
    from dynamo_mpi.common.networks import usable

    if not client.connected:
        return ""
    try:
        by_speed = sorted(usable(host_networks(host)), key=lambda found: -found[0].speed)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=128, dualstack_ipv6=both) as listener:
            client.give_listener(listener.fileno())
            port = listener.getsockname()[1]
    except OSError:  # then they connect after the preflight result
        return ""
    addresses = [str(address.ip) for _, address in by_speed[:_MAX_ADDRESSES]]
    client.agent_token = os.urandom(_TOKEN_BYTES).hex()
    return json.dumps({"host": host, "addresses": [*addresses, LOOPBACK], "port": port, "token": client.agent_token})
