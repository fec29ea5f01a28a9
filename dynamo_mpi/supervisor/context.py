# SPDX-License-Identifier: Apache-2.0
"""The objects that the modules of one rank share after MPI_Init."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient


class RankContext(NamedTuple):
    """What the modules of one rank share; a named tuple, because that needs no import.

    Args:
        world: all ranks.
        launch: how this rank was started.
        argv: the command line, without the program.
        phases: tracks this rank's phases.
        log: this rank's logger.
        agent: this rank's connection to its node agent.
        mpi_version: the MPI library's version string.
    """

    world: World
    launch: LaunchInfo
    argv: Sequence[str]
    phases: PhaseTracker
    log: RankLogger
    agent: NodeAgentClient
    mpi_version: str = ""
