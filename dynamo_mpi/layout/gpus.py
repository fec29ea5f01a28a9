# SPDX-License-Identifier: Apache-2.0
"""Kinds of GPU: architecture and memory."""

from __future__ import annotations

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.frozen import dataclass

_MIB = 2**20

# compute capabilities, times ten
AMPERE = frozenset({80, 86, 87})
ADA = frozenset({89})
HOPPER = frozenset({90})
DATACENTRE_BLACKWELL = frozenset({100, 103})
CONSUMER_BLACKWELL = frozenset({120, 121})
BLACKWELL = DATACENTRE_BLACKWELL | CONSUMER_BLACKWELL


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        name: its name for ``--gpu``.
        sm: compute capability, times ten: 90 for Hopper.
        memory: total bytes that the driver reports.
        nvlink_gpus: number of GPUs that NVLink joins over nodes (NVL72); 0 if it joins only GPUs of a node.
    """

    name: str
    sm: int
    memory: int
    nvlink_gpus: int = 0


# MiB as nvidia-smi shows them in "Memory-Usage"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 81920 * _MIB),
        Gpu("a100-40", 80, 40960 * _MIB),
        Gpu("l4", 89, 23034 * _MIB),
        Gpu("l40s", 89, 46068 * _MIB),
        Gpu("h100", 90, 81559 * _MIB),
        Gpu("h20", 90, 97871 * _MIB),
        Gpu("gh200", 90, 97871 * _MIB),
        Gpu("h200", 90, 143771 * _MIB),
        Gpu("b200", 100, 183359 * _MIB),
        Gpu("gb200", 100, 189471 * _MIB, 72),
        Gpu("b300", 103, 275040 * _MIB),
        Gpu("gb300", 103, 284208 * _MIB, 72),
        Gpu("rtx-pro-6000", 120, 97887 * _MIB),
        Gpu("gb10", 121, 122880 * _MIB),
    )
}


def find_gpu(name: str) -> Gpu:
    """Look up a kind of GPU, by its name in any case.

    Raises:
        UsageError: there is none of this name.
    """
    gpu = GPUS.get(name.strip().lower().replace("_", "-"))
    if gpu is None:
        raise UsageError(
            f"no kind of GPU is called {name!r}", expected=f"one of {', '.join(sorted(GPUS))}", fix="correct --gpu"
        )
    return gpu
