# SPDX-License-Identifier: Apache-2.0
"""One world of the worker under its launcher: command line, environment, and what its ready file says. Nothing is started here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_mpi.local.worlds import World
from dynamo_mpi.services.ports import LOOPBACK
from dynamo_mpi.supervision.tethered import tethered


@dataclass(frozen=True)
class Ranks:
    """One world of the worker under mpirun. Ready when rank 0 has written its ready file."""

    mpirun: tuple[str, ...]
    world: World
    model: Path
    served_model_name: str
    engine_config: Path
    ready_file: Path
    rank_logs: Path
    scratch: Path
    discovery: Mapping[str, str]
    timeline: Path | None = None

    @property
    def name(self) -> str:
        return self.world.name

    def command(self) -> tuple[str, ...]:
        role = self.world.role
        worker = (
            *(sys.executable, "-m", "dynamo_mpi.worker", "--role", role, "--engine", "reference"),
            *("--model", str(self.model), "--served-model-name", self.served_model_name),
            *("--engine-config", str(self.engine_config), "--ready-file", str(self.ready_file)),
            *(() if self.timeline is None else ("--timeline", str(self.timeline))),
            *(() if role == "agg" else ("--kv-network", LOOPBACK)),
        )
        return (*self.mpirun, "-n", str(self.world.tp_size), *tethered(worker, rank_logs=self.rank_logs))

    def environment(self) -> dict[str, str]:
        own = {
            "PYTHONUNBUFFERED": "1",
            "DYN_SELF_HOST_METADATA": "0",  # the frontend reads the model's files by their path
        }
        return {**self.discovery, **own, **mpi_environment(self.scratch, root=os.geteuid() == 0)}

    def ready(self) -> dict[str, Any] | None:
        """Return the ready file's contents, None while there is none. It appears whole, by a rename."""
        try:
            contents = json.loads(self.ready_file.read_text())
        except FileNotFoundError:
            return None
        return contents if isinstance(contents, dict) else None

    def rank_zero(self) -> int | None:
        """Return rank 0's process id, None unless it serves."""
        try:
            pid = (self.ready() or {}).get("pid")
        except (OSError, ValueError):
            return None
        return pid if isinstance(pid, int) else None


def mpi_environment(scratch: Path, *, root: bool) -> dict[str, str]:
    """Return what lets Open MPI 4 and 5 run more ranks than cores; other MPIs ignore it.

    Variables, not flags, because each launcher has flags of its own.

    Args:
        scratch: folder for shared-memory files, which a killed rank can't remove from /dev/shm.
        root: Open MPI refuses root unless told twice.
    """
    variables = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_btl_sm_backing_directory": str(scratch),
        "OMPI_MCA_btl_vader_backing_directory": str(scratch),
    }
    if root:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables
