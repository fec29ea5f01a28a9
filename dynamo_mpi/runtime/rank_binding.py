# SPDX-License-Identifier: Apache-2.0
"""What ranks do about their GPUs after the verdict, apart from the engine: they bind themselves to their GPUs' CPUs (see `checks.bind_rank`),
and the first one of each node has the node's agent listen for errors of the GPUs.

What it needs is imported only then, and only if ranks have GPUs.
"""

from __future__ import annotations

import os

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.binding import RankBinding
    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.engines.spec import EngineSpec
    from dynamo_mpi.supervisor.context import RankContext


def announce_binding(bindings: Sequence[RankBinding], log: RankLogger) -> str:
    """Log to which CPUs and memory the ranks will be bound; return what they need to bind themselves, for `EngineSpec.bind`."""
    if not bindings:
        return ""
    from dynamo_mpi.checks.binding import describe, pack

    if line := describe(bindings):
        log.info(line)
    return pack(bindings)


def bind_to_gpu(context: RankContext, spec: EngineSpec) -> None:
    """Bind this rank to its GPU's CPUs and memory, on any rank, if rank 0 has decided that."""
    if spec.bind:
        from dynamo_mpi.checks.bind_rank import bind_rank

        bind_rank(spec.bind, context.world.rank, os.environ, context.log.warning, context.log.debug)


def watch_gpus(context: RankContext, report: RankReport) -> None:
    """Let the node's agent listen for errors of the GPUs that its ranks use. For every rank; the first one of each node does it.

    Args:
        context: this rank's context.
        report: its report of the preflight.
    """
    if report.gpu_facts and context.launch.local_rank in (0, None):
        from dynamo_mpi.checks.gpu_facts import NodeGpus

        gpus = NodeGpus.unpack(report.gpu_facts)
        if uuids := [gpu.uuid for gpu in gpus.visible_gpus or gpus.gpus]:
            context.agent.send(f"gpus {' '.join(uuids)}")
