# SPDX-License-Identifier: Apache-2.0
"""Where ranks are bound to their GPUs' CPUs: rank 0 logs what was decided, and every rank binds itself.

It happens after the verdict (see `checks.bind_rank`); most of what it needs is imported only then, and only if ranks are to be bound.
"""

from __future__ import annotations

import os

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.checks.binding import RankBinding
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
