# SPDX-License-Identifier: Apache-2.0
"""Doctor's check of which CPUs are next to the GPUs, and in a rank whether it runs there (V17)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_mpi.checks.bind_rank import ENGINE_VARIABLE
from dynamo_mpi.checks.binding import check_binding, decide
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.common.affinity import allowed_cpus
from dynamo_mpi.mpi.placement import spans
from dynamo_mpi.ops.doctor.check import Check, Context, of_finding, ok, skipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.checks.gpu_facts import NodeGpus


def check_places(context: Context, gpus: NodeGpus, host: str) -> Iterator[Check]:
    """Read this process's CPUs, and evaluate them."""
    if not gpus.gpus:
        return
    variables = tuple((name, value) for name, value in context.environ.items() if name == ENGINE_VARIABLE)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    facts = HostFacts(False, "", cpus, variables, allowed=allowed_cpus())
    yield judge(RankFacts(context.launch.rank, host, facts, gpus), in_rank=context.in_rank)


def judge(row: RankFacts, *, in_rank: bool) -> Check:
    """Evaluate the place of a node's GPUs, and of one rank."""
    near: dict[tuple[str, int], list[int]] = {}
    for gpu in row.gpus.gpus:
        if gpu.place is not None and gpu.place.cpus:
            near.setdefault((gpu.place.cpus, gpu.place.node), []).append(gpu.number)
    if not near:
        return skipped("binding", "which CPUs are next to the GPUs isn't known: ranks stay unbound")
    if in_rank:
        for finding in check_binding([row], decide([row], bind=True)):
            return of_finding("binding", finding)
    parts = (
        f"GPU{'' if len(numbers) == 1 else 's'} {spans(numbers)} next to CPUs {cpus} (node {node})"
        for (cpus, node), numbers in near.items()
    )
    return ok("binding", "; ".join(parts))
