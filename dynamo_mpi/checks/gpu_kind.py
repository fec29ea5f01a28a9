# SPDX-License-Identifier: Apache-2.0
"""Finds which kind in `layout.gpus` the ranks' GPUs are, so that rules over formats and memory need no ``--gpu``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dynamo_mpi.layout.gpus import GPUS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynamo_mpi.checks.rank_facts import RankFacts
    from dynamo_mpi.layout.gpus import Gpu

# drivers reserve different amounts
_SAME_MEMORY = 0.03


def kind_in(rows: Iterable[RankFacts]) -> str | None:
    """Return the kind of all GPUs that ranks see; None if there are several kinds, or if the kind isn't known."""
    kinds = {kind_of(gpu.name, gpu.sm, gpu.total_bytes) for row in rows for gpu in row.gpus.visible_gpus}
    return kinds.pop() if len(kinds) == 1 else None


def kind_of(name: str, sm: int, total_bytes: int) -> str | None:
    """Return a GPU's kind, as for ``--gpu``; None if it isn't known.

    Architecture and memory must be those of the kind. The product's name decides between kinds that share both, and if the memory isn't
    known; if the name is another kind's, as for an H100 with an H200's memory, the result is None.

    Args:
        name: as NVML reports it: ``NVIDIA H100 80GB HBM3``.
        sm: compute capability, times ten.
        total_bytes: memory; 0 if it isn't known.
    """
    words = f"-{re.sub('[^a-z0-9]+', '-', name.lower())}-"
    alike = [
        gpu
        for gpu in GPUS.values()
        if gpu.sm == sm and (not total_bytes or abs(gpu.memory - total_bytes) <= gpu.memory * _SAME_MEMORY)
    ]
    named = [gpu for gpu in alike if f"-{_product(gpu)}-" in words]
    if named:
        return named[0].name if len(named) == 1 else None
    other = any(f"-{_product(gpu)}-" in words for gpu in GPUS.values())
    return alike[0].name if len(alike) == 1 and total_bytes and not other else None


def _product(gpu: Gpu) -> str:
    """Return the product's name, which two sizes of memory may share: an ``a100-40`` is an A100."""
    front = gpu.name.rpartition("-")[0]
    return front if front in GPUS else gpu.name
