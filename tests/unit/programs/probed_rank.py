# SPDX-License-Identifier: Apache-2.0
"""A rank other than 0, as far as those see it who probe its node. It does what it reads from its stdin."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn, cast

from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.runtime.agent_process import AgentStarter
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.health_address import HealthEndpoint, open_health_endpoint
from dynamo_mpi.telemetry.health_client import HealthClient

if TYPE_CHECKING:
    from dynamo_mpi.mpi.world import World

RANK, SIZE = 2, 4


class NoWorld:
    """The little of a world that a heartbeat client needs."""

    rank, size = RANK, SIZE

    def abort(self, code: int) -> NoReturn:
        os._exit(code)


def main() -> None:
    """Begin, print the port and the agent's process, and do what comes in."""
    log = RankLogger(RANK, "n2")
    launch = LaunchInfo(Launcher.SLURM_PMIX, rank=RANK, size=SIZE, local_rank=0, local_size=2)
    endpoint = open_health_endpoint(launch, log, os.environ)
    assert isinstance(endpoint, HealthEndpoint), endpoint
    early = WorkerSources(sys.argv[1:], {}).early
    starter = AgentStarter(launch, "n2", early, os.environ, endpoint)
    started = starter.spawn()
    assert started is not None, "no agent"
    agent = NodeAgentClient(launch, os.environ, started, starter.respawn)
    reporter = HealthClient(agent, endpoint.address, early.heartbeat_timeout)
    phases = PhaseTracker()
    phases.on_phase(lambda name: agent.send(f"phase {name}"))
    phases.on_phase(reporter.send_phase)
    print(endpoint.address.port, started.pid, flush=True)
    client: HeartbeatClient | None = None
    for line in sys.stdin:
        word, _, text = line.rstrip("\n").partition(" ")
        if word == "begin":
            phases.begin(text)
        elif word == "join":
            rendezvous, _ = Rendezvous.unpack(bytes.fromhex(text))
            client = HeartbeatClient(rendezvous, cast("World", NoWorld()), phases, log)
            reporter.follow(client, {"role": "decode"})
        elif word == "fork":
            # it inherits all that is open here, as an engine's helpers may
            if (child := os.fork()) == 0:
                signal.pause()
            print(child, flush=True)
        elif word == "agent":
            agent.send(text)
        elif word == "fail" and client is not None:
            client.report_failure(RuntimeError(text))
        else:
            reporter.send(word, text)
    if client is not None:
        client.close()
    agent.detach()


if __name__ == "__main__":
    main()
