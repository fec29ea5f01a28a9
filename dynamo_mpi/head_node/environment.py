# SPDX-License-Identifier: Apache-2.0
"""The environment of the head node's parts, made of this process's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.services.ports import LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# etcd takes ETCD_… for flags of its own
_SERVERS = ("ETCD_",)
# another deployment's; how long a lease lives, and the like, stay
_CLIENTS = ("ETCD_ENDPOINTS", "ETCD_AUTH_", "NATS_SERVER", "NATS_AUTH_", "NATS_TLS_")
# none of the parts is a rank
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_")


def server_environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment of etcd and NATS.

    Args:
        own: this process's.
        scratch: folder for temporary files.
    """
    return _without(own, _SERVERS + _LAUNCHERS) | {"TMPDIR": str(scratch)}


def frontend_environment(own: Mapping[str, str], scratch: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Return the environment that the frontend starts from; how it finds etcd and NATS is added to it.

    Args:
        own: this process's, whose ``DYN_*`` settings are the frontend's.
        scratch: folder for temporary files.
        hosts: addresses that are reached without a proxy.
    """
    variables = _without(own, _CLIENTS + _LAUNCHERS)
    variables |= {"TMPDIR": str(scratch), "DYN_DISCOVERY_BACKEND": "etcd", "DYN_SDK_DISABLE_ANSI_LOGGING": "1"}
    for name in ("no_proxy", "NO_PROXY"):
        variables[name] = ",".join(filter(None, (own.get(name), *hosts, LOOPBACK, "localhost")))
    return variables


def _without(own: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in own.items() if not name.startswith(prefixes)}
