# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of a rank other than 0 with TensorRT-LLM after preflight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.log import print_trtllm_launch_line
from dynamo_mpi.engines.trtllm.rank_environment import prepare_rank
from dynamo_mpi.engines.trtllm.session import serve_tasks
from dynamo_mpi.engines.trtllm.task import install

if TYPE_CHECKING:
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient


def follow_trtllm(world: World, lifeline: HeartbeatClient) -> None:
    """Join TensorRT-LLM's world and run what rank 0 asks for, until it closes the session."""
    comm, tasks = world.duplicate(), world.duplicate()
    install(tasks, lifeline.report_failure)
    prepare_rank(world.rank)
    print_trtllm_launch_line("worker", world.rank, world.size)
    try:
        serve_tasks(comm)
    except BaseException as error:
        lifeline.report_failure(error)
