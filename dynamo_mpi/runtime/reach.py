# SPDX-License-Identifier: Apache-2.0
"""Rank 0's address on several hosts and what the Dynamo runtime must publish. On rank 0, during preflight."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.host_address import host_address, known_address, source_address
from dynamo_mpi.common.interfaces import host_networks
from dynamo_mpi.common.networks import HostNetworks, choose, distinct, usable
from dynamo_mpi.common.ports import LOOPBACK, LOOPBACK_INTERFACE, in_url
from dynamo_mpi.discovery.endpoints import read_address

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.common.networks import Choice

_RPC_HOST, _STREAM_HOST = "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"
_ETCD_PORT = 2379
_EVERYWHERE = ("0.0.0.0/0", "::/0")


def meeting_place(cards: Sequence[RankReport], setting: str | None) -> Choice | None:
    """Return where rank 0 is reached; None where all ranks are on one host, or where their hosts' networks aren't known.

    Args:
        cards: of all ranks.
        setting: ``--liveness-network``.

    Raises:
        UsageError: there is no such place.
    """
    known = [HostNetworks.unpack(card.host, card.networks) for card in cards if card.networks]
    known.sort(key=lambda host: host.host != cards[0].host)
    hosts = distinct(known)
    if len(hosts) < 2 or hosts[0].host != cards[0].host:
        return None
    return choose(hosts, known_address(), setting)


def let_runtime_be_reached(choice: Choice | None, etcd: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Tell the Dynamo runtime at which address of this host frontends reach it, unless the user has, or it finds one by itself.

    By itself it takes the address of the default route, or of any interface; on a host that has loopback alone it ends instead.

    Args:
        choice: `meeting_place`'s.
        etcd: the endpoints. A process that uses this worker also uses etcd: where that is in another network, so is the address.
        environ: this process's; what it starts inherits it.
    """
    own = host_networks()
    if next(usable(own), None) is None:
        wanted = {_RPC_HOST: LOOPBACK, _STREAM_HOST: LOOPBACK_INTERFACE}
    elif choice is not None or not set(_EVERYWHERE) & set(own.routes):
        wanted = {_RPC_HOST: in_url(_published(choice, own, etcd))}
    else:
        wanted = {}
    for name, value in wanted.items():
        if not environ.get(name):
            environ[name] = value


def _published(choice: Choice | None, own: HostNetworks, etcd: Sequence[str]) -> str:
    here = {str(address.ip) for _, address in usable(own)}
    for family, address in _resolved(etcd):
        source = source_address(family, address)
        # loopback tells nothing of where frontends are
        if source in here:
            near = choice is not None and choice.network and ip_address(address) in ip_network(choice.network)
            return choice.address if choice is not None and near else source
    return host_address(None, "") if choice is None else choice.address


def _resolved(etcd: Sequence[str]) -> list[tuple[int, str]]:
    found = []
    for endpoint in etcd:
        try:
            host = read_address(endpoint, _ETCD_PORT, ("http", "https"), "ETCD_ENDPOINTS").host
            places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (DynamoMpiError, OSError, UnicodeError):
            continue
        found += [(int(family), str(place[0])) for family, _, _, _, place in places]
    return found
