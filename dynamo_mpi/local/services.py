# SPDX-License-Identifier: Apache-2.0
"""The stack's own parts: the ranks under mpirun, and what all parts' environment is. Nothing is started here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynamo_mpi.services.ports import LOOPBACK
from dynamo_mpi.supervision.tethered import tethered

if TYPE_CHECKING:
    from dynamo_mpi.services.etcd import Etcd
    from dynamo_mpi.services.nats import Nats

RequestPlane = Literal["tcp", "nats"]
NAMESPACE = "local"

# What belongs to another deployment, or to the launcher this command itself runs under, must not leak into the stack.
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", "PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


@dataclass(frozen=True)
class Ranks:
    """One world of the worker under mpirun. Ready when rank 0 has written its ready file."""

    mpirun: tuple[str, ...]
    tp_size: int
    model: Path
    served_model_name: str
    engine_config: Path
    ready_file: Path
    rank_logs: Path
    scratch: Path
    discovery: Mapping[str, str]
    name: str = "worker"

    def command(self) -> tuple[str, ...]:
        worker = (
            *(sys.executable, "-m", "dynamo_mpi.worker", "--role", "agg", "--engine", "reference"),
            *("--model", str(self.model), "--served-model-name", self.served_model_name),
            *("--engine-config", str(self.engine_config), "--ready-file", str(self.ready_file)),
        )
        return (*self.mpirun, "-n", str(self.tp_size), *tethered(worker, rank_logs=self.rank_logs))

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


def discovery_environment(etcd: Etcd, nats: Nats, request_plane: RequestPlane) -> dict[str, str]:
    """Return how frontend and worker find each other.

    ``NATS_SERVER`` is set for the nats plane only: Dynamo's runtime connects wherever it is set, needed or not.
    """
    variables = {"ETCD_ENDPOINTS": etcd.url, "DYN_NAMESPACE": NAMESPACE, "DYN_REQUEST_PLANE": request_plane}
    return variables | ({"NATS_SERVER": nats.url} if request_plane == "nats" else {})


def base_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment every part starts from: ours, less what belongs to another deployment.

    Args:
        own: this process's environment.
        scratch: folder for temporary files, removed with the run's folder.
    """
    variables = {name: value for name, value in own.items() if not name.startswith(_FOREIGN) or name.startswith(_KEPT)}
    variables.setdefault("DYN_LOG", "warn")
    variables["DYN_SDK_DISABLE_ANSI_LOGGING"] = "1"
    variables["TMPDIR"] = str(scratch)
    for name in ("no_proxy", "NO_PROXY"):  # gRPC would take a proxy even to loopback
        variables[name] = ",".join(filter(None, (variables.get(name), LOOPBACK, "localhost")))
    return variables
