# SPDX-License-Identifier: Apache-2.0
"""Brings the node agents of a world over several nodes together as soon as MPI runs. Imported before the verdict."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient

_MOST_ADDRESSES = 8
_TOKEN_BYTES = 32
# last: pods of one host may share it
LOOPBACK = "127.0.0.1"
_BARRIER_SECONDS = 5.0


def introduce_agents(world: World, local_rank: int | None, client: NodeAgentClient, host: str) -> None:
    """Have the agents of all nodes connect to rank 0's. Collective.

    Args:
        world: all ranks.
        local_rank: this rank's place among those of its node.
        client: its connection to its node agent.
        host: this node.
    """
    text = world.broadcast(_invite(client, host).encode() if world.rank == 0 else b"").decode()
    # one for each node, rank 0's too
    if text and local_rank == 0:
        client.send(f"agents {text}")
    # from here on no rank can end whose agent hasn't heard of the others
    world.barrier(_BARRIER_SECONDS)


def _invite(client: NodeAgentClient, host: str) -> str:
    """Listen for the agents of other nodes at all addresses of this host, as which of them others reach isn't known before the verdict.

    Returns:
        Where, and what they have to know, as one line; empty where there is no agent, or nothing to listen at.
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
    except OSError:  # they come together after the verdict, then
        return ""
    addresses = [str(address.ip) for _, address in by_speed[:_MOST_ADDRESSES]]
    client.agent_token = os.urandom(_TOKEN_BYTES).hex()
    return json.dumps({"host": host, "addresses": [*addresses, LOOPBACK], "port": port, "token": client.agent_token})
