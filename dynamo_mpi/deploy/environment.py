# SPDX-License-Identifier: Apache-2.0
"""The environments of etcd, NATS and the frontend, made of this process's. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dynamo_mpi.common.ports import LOOPBACK, LOOPBACK_INTERFACE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.services import Etcd, Nats

RequestPlane = Literal["tcp", "nats"]
LOCAL_NAMESPACE = "local"

# etcd takes ETCD_… for flags of its own
_SERVERS = ("ETCD_",)
# another deployment's; how long a lease lives, and the like, stay
_CLIENTS = ("ETCD_ENDPOINTS", "ETCD_AUTH_", "NATS_SERVER", "NATS_AUTH_", "NATS_TLS_")
# none of the services is a rank
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
# what belongs to another deployment, or to the launcher that this command itself runs under
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", *_LAUNCHERS)
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


def server_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment of a job's etcd and NATS.

    Args:
        own: this process's.
        scratch: folder for temporary files.
    """
    return _without(own, _SERVERS + _LAUNCHERS) | {"TMPDIR": str(scratch)}


def frontend_environment(own: Mapping[str, str], scratch: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Return the environment that a job's frontend starts from; how it finds etcd and NATS is added to it.

    Args:
        own: this process's, whose ``DYN_*`` settings are the frontend's.
        scratch: folder for temporary files.
        hosts: addresses that are reached without a proxy.
    """
    variables = _without(own, _CLIENTS + _LAUNCHERS) | {"DYN_DISCOVERY_BACKEND": "etcd"}
    return variables | _common(own, scratch, hosts)


def local_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment that every process of the local stack starts from.

    Args:
        own: this process's.
        scratch: folder for temporary files, removed with the run's folder.
    """
    variables = {"DYN_LOG": "warn", **_without(own, _FOREIGN, _KEPT)}
    return variables | _common(own, scratch)  # gRPC would take a proxy even to loopback


def discovery_environment(etcd: Etcd, nats: Nats, request_plane: RequestPlane) -> dict[str, str]:
    """Return how the local stack's frontend and workers find each other: on loopback, which a machine without a network has, too.

    ``NATS_SERVER`` is set for the nats plane only: Dynamo's runtime connects wherever it is set, needed or not.
    """
    variables = {
        "ETCD_ENDPOINTS": etcd.url,
        "DYN_NAMESPACE": LOCAL_NAMESPACE,
        "DYN_REQUEST_PLANE": request_plane,
        "DYN_TCP_RPC_HOST": LOOPBACK,
        "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK_INTERFACE,
    }
    return variables | ({"NATS_SERVER": nats.url} if request_plane == "nats" else {})


def _common(own: Mapping[str, str], scratch: Path, hosts: Sequence[str] = ()) -> dict[str, str]:
    variables = {"TMPDIR": str(scratch), "DYN_SDK_DISABLE_ANSI_LOGGING": "1"}
    for name in ("no_proxy", "NO_PROXY"):
        variables[name] = ",".join(filter(None, (own.get(name), *hosts, LOOPBACK, "localhost")))
    return variables


def _without(own: Mapping[str, str], prefixes: tuple[str, ...], kept: tuple[str, ...] = ()) -> dict[str, str]:
    return {name: value for name, value in own.items() if not name.startswith(prefixes) or name.startswith(kept)}
