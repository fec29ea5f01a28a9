# SPDX-License-Identifier: Apache-2.0
"""What parts of a rank are handed, for tests of one part counted: no node agent, and no launcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.mpi.world import World
from dynamo_mpi.supervisor.agent_client import NodeAgentClient
from dynamo_mpi.supervisor.context import RankContext


def rank_context(
    phases: PhaseTracker | None = None, *, world: World | None = None, ranks: int = 1, host: str = "n0"
) -> RankContext:
    """Return rank 0's, without a node agent; without ``world`` for a world that only counts its ranks."""
    launch = LaunchInfo(Launcher.ALONE)
    counted = cast(World, SimpleNamespace(size=ranks, rank=0))
    log = RankLogger(0, host)
    return RankContext(world or counted, launch, (), phases or PhaseTracker(), log, NodeAgentClient(launch, {}, None))


class OneRank:
    """A world of one rank."""

    rank, size = 0, 1

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes = b"") -> bytes:
        return data
