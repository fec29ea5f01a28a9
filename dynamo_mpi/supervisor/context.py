# SPDX-License-Identifier: Apache-2.0
"""What every part of a rank shares once MPI is up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient


class RankContext(NamedTuple):
    """One rank's; a named tuple, because a rank imports nothing for it.

    Args:
        world: all ranks.
        launch: how this rank was started.
        argv: the command line, without the program.
        phases: where durations go.
        log: this rank's.
        agent: this rank's connection to its node agent.
        mpi_version: what the MPI library calls itself.
    """

    world: World
    launch: LaunchInfo
    argv: Sequence[str]
    phases: PhaseTracker
    log: RankLogger
    agent: NodeAgentClient
    mpi_version: str = ""
