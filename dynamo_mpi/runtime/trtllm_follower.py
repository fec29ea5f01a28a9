# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of a rank other than 0 with TensorRT-LLM after preflight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.log import print_trtllm_launch_line
from dynamo_mpi.engines.trtllm.session import serve_tasks
from dynamo_mpi.engines.trtllm.task import install, prepare_rank

if TYPE_CHECKING:
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient


def follow_trtllm(world: World, heartbeat: HeartbeatClient) -> None:
    """Join TensorRT-LLM's session and run its tasks until rank 0 closes it."""
    comm, tasks = world.duplicate(), world.duplicate()
    install(tasks, heartbeat.report_failure)
    prepare_rank(world.rank)
    print_trtllm_launch_line("worker", world.rank, world.size)
    try:
        serve_tasks(comm)
    except BaseException as error:
        heartbeat.report_failure(error)
