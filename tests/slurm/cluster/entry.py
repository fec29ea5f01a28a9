# SPDX-License-Identifier: Apache-2.0
"""How ``inside`` is started, from outside the cluster and from within."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = __name__.rpartition(".")[0]
IMPORT_ROOT = Path(__file__).parents[len(PACKAGE.split("."))]
"""The folder that must be on sys.path for ``PACKAGE`` to be found."""


def inside_command(verb: str, state: Path, *arguments: str) -> list[str]:
    """The argv that runs ``inside``; ``-S`` as it needs nothing but the standard library, and starts sooner."""
    return [sys.executable, "-S", "-m", f"{PACKAGE}.inside", verb, str(state), *arguments]


def inside_environment(state: Path) -> dict[str, str]:
    """All that daemons see: nothing of a Slurm job, an mpirun or a virtual environment around the caller."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(IMPORT_ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SLURM_CONF": str(state / "slurm.conf"),
    }
