# SPDX-License-Identifier: Apache-2.0
"""What the stack's services have in common: how they are found, and what all parts' environment is. Nothing is started here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dynamo_mpi.services.ports import LOOPBACK, LOOPBACK_INTERFACE

if TYPE_CHECKING:
    from dynamo_mpi.services.etcd import Etcd
    from dynamo_mpi.services.nats import Nats

RequestPlane = Literal["tcp", "nats"]
NAMESPACE = "local"

# What belongs to another deployment, or to the launcher this command itself runs under, must not leak into the stack.
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", "PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


def discovery_environment(etcd: Etcd, nats: Nats, request_plane: RequestPlane) -> dict[str, str]:
    """Return how frontend and worker find each other: on loopback, which a machine without a network has, too.

    ``NATS_SERVER`` is set for the nats plane only: Dynamo's runtime connects wherever it is set, needed or not.
    """
    variables = {
        "ETCD_ENDPOINTS": etcd.url,
        "DYN_NAMESPACE": NAMESPACE,
        "DYN_REQUEST_PLANE": request_plane,
        "DYN_TCP_RPC_HOST": LOOPBACK,
        "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK_INTERFACE,
    }
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
