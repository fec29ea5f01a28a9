# SPDX-License-Identifier: Apache-2.0
"""What parts of a rank are handed, for tests of one part alone: no node agent, and no launcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from dynamo_mpi.launchers.launch import Launch, Launcher
from dynamo_mpi.supervision.agent_client import NodeAgentClient
from dynamo_mpi.supervision.context import RankContext
from dynamo_mpi.supervision.phases import Phases
from dynamo_mpi.talk import Voice
from dynamo_mpi.world import World


def rank_context(
    phases: Phases | None = None, *, world: World | None = None, rank: int = 0, host: str = "n0"
) -> RankContext:
    """Return one for a rank without a node agent; without ``world`` it is the only rank."""
    launch = Launch(Launcher.ALONE)
    alone = cast(World, SimpleNamespace(size=1, rank=0))
    voice = Voice(rank, host)
    return RankContext(world or alone, launch, (), phases or Phases(), voice, NodeAgentClient(launch, {}, None))
