# SPDX-License-Identifier: Apache-2.0
"""Rank 0's address on several hosts and what the Dynamo runtime must publish. On rank 0, during preflight."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.host_address import host_address, known_address, source_address
from dynamo_mpi.common.interfaces import host_networks
from dynamo_mpi.common.networks import SETTING, HostNetworks, choose, distinct, usable
from dynamo_mpi.common.ports import LOOPBACK, LOOPBACK_INTERFACE, in_url
from dynamo_mpi.discovery.endpoints import read_address

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.networks import Choice

_RPC_HOST, _STREAM_HOST = "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"
_ETCD_PORT = 2379
_EVERYWHERE = ("0.0.0.0/0", "::/0")


def choose_rank0_address(reports: Sequence[RankReport], setting: str | None) -> Choice | None:
    """Return rank 0's address; None if all ranks are on one host, or if the hosts' networks aren't known.

    Args:
        reports: the reports of all ranks.
        setting: ``--liveness-network``.

    Raises:
        UsageError: there is no address that all hosts can reach, or this host has none as the setting asks for.
    """
    known = [HostNetworks.unpack(report.host, report.networks) for report in reports if report.networks]
    known.sort(key=lambda host: host.host != reports[0].host)
    hosts = distinct(known)
    if len(hosts) < 2 or hosts[0].host != reports[0].host:
        if setting is not None and len(reports) > 1:
            host_address(setting, SETTING)
        return None
    return choose(hosts, known_address(), setting)


def set_runtime_address(choice: Choice | None, etcd: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Set the address of this host at which frontends reach the Dynamo runtime, unless the user has set it or the runtime finds it.

    By itself the runtime takes the address of the default route, or of any interface; on a host with loopback alone it exits.

    Args:
        choice: the result of `choose_rank0_address`.
        etcd: etcd's endpoints. Clients of this worker also use etcd: if etcd is in another network, the address is taken from that network.
        environ: this process's environment variables; child processes inherit them.
    """
    networks = host_networks()
    if next(usable(networks), None) is None:
        variables = {_RPC_HOST: LOOPBACK, _STREAM_HOST: LOOPBACK_INTERFACE}
    elif choice is not None or not set(_EVERYWHERE) & set(networks.routes):
        variables = {_RPC_HOST: in_url(_published(choice, networks, etcd))}
    else:
        variables = {}
    for name, value in variables.items():
        if not environ.get(name):
            environ[name] = value


def _published(choice: Choice | None, networks: HostNetworks, etcd: Sequence[str]) -> str:
    local_addresses = {str(address.ip) for _, address in usable(networks)}
    for family, address in _resolved(etcd):
        source = source_address(family, address)
        # loopback does not show in which network the frontends are
        if source in local_addresses:
            near = choice is not None and choice.network and ip_address(address) in ip_network(choice.network)
            return choice.address if choice is not None and near else source
    return host_address(None, "") if choice is None else choice.address


def _resolved(etcd: Sequence[str]) -> list[tuple[int, str]]:
    found = []
    for endpoint in etcd:
        try:
            host = read_address(endpoint, _ETCD_PORT, ("http", "https"), "ETCD_ENDPOINTS").host
            addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (DynamoMpiError, OSError, UnicodeError):
            continue
        found += [(int(family), str(address[0])) for family, _, _, _, address in addresses]
    return found
