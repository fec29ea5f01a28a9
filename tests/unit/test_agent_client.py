# SPDX-License-Identifier: Apache-2.0
"""A rank's connection to its node agent."""

from __future__ import annotations

import socket
import time

from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.agent_socket import Agent

ALONE = LaunchInfo(Launcher.ALONE, size=1)


def test_an_agent_that_reads_nothing_holds_no_rank_up() -> None:
    ours, theirs = socket.socketpair()
    client = NodeAgentClient(ALONE, {}, Agent(ours, 2**22 + 1))
    start = time.monotonic()
    for number in range(400):
        client.send(f"health progress {number} {'x' * 3000}")
    client.send("phase load")
    assert time.monotonic() - start < 5
    # once it reads again, it gets whole lines, and the last phase
    theirs.settimeout(10)
    received = b""
    while b"phase load\n" not in received:
        received += theirs.recv(1 << 16)
        client.send("ping")
    lines = received.decode().splitlines()[:-1]
    assert all(line.startswith(("mark ", "rank ", "health progress ", "phase ", "ping")) for line in lines)
    client.detach()
    theirs.close()
