# SPDX-License-Identifier: Apache-2.0
"""The environments of etcd, NATS and the frontend, derived from this process's. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dynamo_mpi.common.ports import LOOPBACK, LOOPBACK_INTERFACE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.services import Etcd, Nats

RequestPlane = Literal["tcp", "nats"]
LOCAL_NAMESPACE = "local"

# etcd reads ETCD_… as its own flags
_SERVERS = ("ETCD_",)
# those of another deployment; settings such as the lease's time stay
_CLIENTS = ("ETCD_ENDPOINTS", "ETCD_AUTH_", "NATS_SERVER", "NATS_AUTH_", "NATS_TLS_")
# none of the services is a rank
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")
# variables of another deployment, or of the launcher under which this command itself runs
_FOREIGN = ("ETCD_", "NATS_", "DYN_", "SLURM", *_LAUNCHERS)
_KEPT = ("DYN_LOG", "DYN_MPI_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")


def server_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment of a job's etcd and NATS.

    Args:
        own: this process's environment.
        scratch: folder for temporary files.
    """
    return _without(own, _SERVERS + _LAUNCHERS) | {"TMPDIR": str(scratch)}


def frontend_environment(own: Mapping[str, str], scratch: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Return the base environment of a job's frontend; the addresses of etcd and NATS are added to it.

    Args:
        own: this process's environment, whose ``DYN_*`` settings are used by the frontend.
        scratch: folder for temporary files.
        hosts: addresses that are reached without a proxy.
    """
    variables = _without(own, _CLIENTS + _LAUNCHERS) | {"DYN_DISCOVERY_BACKEND": "etcd"}
    return variables | _common(own, scratch, hosts)


def local_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the base environment of every process of the local stack.

    Args:
        own: this process's environment.
        scratch: folder for temporary files, removed with the run's folder.
    """
    variables = {"DYN_LOG": "warn", **_without(own, _FOREIGN, _KEPT)}
    return variables | _common(own, scratch)  # gRPC would use a proxy even for loopback


def discovery_environment(etcd: Etcd, nats: Nats, request_plane: RequestPlane) -> dict[str, str]:
    """Return the variables by which the local stack's frontend and workers find etcd and NATS: on loopback, so that no network is needed.

    ``NATS_SERVER`` is set only for the nats plane: Dynamo's runtime connects whenever it is set, even if NATS isn't needed.
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
