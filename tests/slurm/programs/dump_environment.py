# SPDX-License-Identifier: Apache-2.0
"""Write this process's launch-related environment to ``FOLDER/RANK.json``.

Usage: ``dump_environment.py FOLDER RANK_VARIABLE`` with ``-`` as RANK_VARIABLE for a shell that is no rank ("0.json").
MPI is left alone: what a launcher detector may look at is what is there *before* MPI_Init.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

LAUNCH_PREFIXES = ("SLURM", "PMI", "OMPI_", "PRTE_", "HYD", "MPI", "SALLOC_", "SBATCH_", "SRUN_")
LAUNCH_NAMES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
NOT_FROM_A_LAUNCHER = ("MPI4PY_",)


def launch_environment(environment: dict[str, str]) -> dict[str, str]:
    """Keep what launchers set, sorted by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(LAUNCH_PREFIXES) or name in LAUNCH_NAMES) and not name.startswith(NOT_FROM_A_LAUNCHER)
    }


def main() -> None:
    folder, rank_variable = Path(sys.argv[1]), sys.argv[2]
    rank = 0 if rank_variable == "-" else int(os.environ[rank_variable])
    with (folder / f"{rank}.json").open("x") as stream:  # "x": two processes that claim one rank must not pass
        json.dump(launch_environment(dict(os.environ)), stream)


if __name__ == "__main__":
    main()
