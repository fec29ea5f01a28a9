# SPDX-License-Identifier: Apache-2.0
"""What parts of a rank are handed, for tests of one part counted: no node agent, and no launcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from dynamo_mpi.launchers.launch import Launch, Launcher
from dynamo_mpi.supervision.agent_client import NodeAgentClient
from dynamo_mpi.supervision.context import RankContext
from dynamo_mpi.supervision.phases import Phases
from dynamo_mpi.talk import RankLogger
from dynamo_mpi.world import World


def rank_context(
    phases: Phases | None = None, *, world: World | None = None, ranks: int = 1, host: str = "n0"
) -> RankContext:
    """Return rank 0's, without a node agent; without ``world`` for a world that only counts its ranks."""
    launch = Launch(Launcher.ALONE)
    counted = cast(World, SimpleNamespace(size=ranks, rank=0))
    log = RankLogger(0, host)
    return RankContext(world or counted, launch, (), phases or Phases(), log, NodeAgentClient(launch, {}, None))
