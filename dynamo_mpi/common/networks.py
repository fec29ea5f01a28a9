# SPDX-License-Identifier: Apache-2.0
"""Selects the network that the hosts of a world share, and rank 0's address in it. Pure."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

    Address = IPv4Address | IPv6Address
    Network = IPv4Network | IPv6Network

SETTING = "--liveness-network (DYN_MPI_LIVENESS_NETWORK)"
LOOPBACK, BRIDGE, TUNNEL = "loopback", "bridge", "tunnel"
"""Kinds of interfaces that are treated specially: a bridge of containers or virtual machines is inside one host, a tunnel is slow."""
# names of host-internal bridges of Docker, Podman, libvirt, LXD and Kubernetes' plugins, and of tunnels
_BRIDGES = ("docker", "podman", "virbr", "lxcbr", "lxdbr", "cni", "cbr", "kube-bridge", "flannel.", "weave", "nerdctl")
_TUNNELS = ("tun", "tap", "wg", "ppp", "tailscale", "zt", "ipsec", "vti", "gre", "sit", "ip6tnl")
_DOCKER_DIGITS = 12
_MOST_HOSTS = 8


class Interface(NamedTuple):
    """One interface of a host.

    Args:
        name: ``ib0``.
        addresses: addresses with prefix length: ``10.1.0.2/16``.
        speed: the link's speed in Mb/s; 0 if it isn't known.
        up: whether it is up and has a carrier.
        kind: ``LOOPBACK``, ``BRIDGE``, ``TUNNEL``, or empty.
    """

    name: str
    addresses: tuple[str, ...]
    speed: int = 0
    up: bool = True
    kind: str = ""


class HostNetworks(NamedTuple):
    """A host's networks.

    Args:
        host: its name; empty in a rank's report, which has a field for it.
        namespace: identifies the network namespace. Hosts in the same one count as one host.
        interfaces: in the kernel's order.
        routes: networks to which it has a route, ``0.0.0.0/0`` for a default route.
    """

    host: str
    namespace: str
    interfaces: tuple[Interface, ...]
    routes: tuple[str, ...] = ()

    def pack(self) -> tuple[str, ...]:
        """Encode it as a flat list of strings for `dynamo_mpi.common.codec`, without the host's name."""
        values = [self.namespace, str(len(self.routes)), *self.routes]
        for name, addresses, speed, up, kind in self.interfaces:
            values += [name, str(speed), "up" if up else "", kind, str(len(addresses)), *addresses]
        return tuple(values)

    @classmethod
    def unpack(cls, host: str, values: Sequence[str]) -> HostNetworks:
        """Decode the result of `pack`.

        Raises:
            ValueError: ``values`` is invalid.
        """
        rest = iter(values)
        try:
            namespace = next(rest)
            routes = tuple(next(rest) for _ in range(int(next(rest))))
            interfaces = []
            for name in rest:
                speed, up, kind, count = next(rest), next(rest), next(rest), int(next(rest))
                interfaces.append(
                    Interface(name, tuple(next(rest) for _ in range(count)), int(speed), up == "up", kind)
                )
        except (StopIteration, RuntimeError):  # RuntimeError: StopIteration within a generator
            raise ValueError(f"{len(values)} fields can't be the networks of a host") from None
        return cls(host, namespace, tuple(interfaces), routes)


class Shared(NamedTuple):
    """A network that all hosts share.

    Args:
        network: ``10.1.0.0/16``.
        interface: rank 0's interface.
        address: rank 0's address.
        speed: the speed of the slowest host's link, in Mb/s; 0 if one isn't known.
        tunnel: whether a host is connected by a tunnel only.
    """

    network: str
    interface: str
    address: str
    speed: int
    tunnel: bool


class Choice(NamedTuple):
    """The address at which ranks reach rank 0.

    Args:
        address: rank 0's address.
        network: the network that all hosts share, or that the user has set; empty if there is none.
        line: the choice as a log line.
    """

    address: str
    network: str
    line: str


def kind_of(name: str, *, loopback: bool, bridge: bool, tunnel: bool) -> str:
    """Return an interface's kind.

    Args:
        name: its name.
        loopback: whether the kernel calls it loopback.
        bridge: whether it is a bridge. Only host-internal bridges, by name, count: a host's own address may be on a bridge.
        tunnel: whether the kernel calls it point-to-point.
    """
    if loopback:
        return LOOPBACK
    docker = name.startswith("br-") and len(name) == len("br-") + _DOCKER_DIGITS
    if name.startswith(_BRIDGES) or (docker and bridge):
        return BRIDGE
    return TUNNEL if tunnel or name.startswith(_TUNNELS) else ""


def distinct(hosts: Sequence[HostNetworks]) -> list[HostNetworks]:
    """Return one host of each network namespace, in order."""
    return list({host.namespace or f"of {host.host}": host for host in reversed(hosts)}.values())[::-1]


def usable(host: HostNetworks) -> Iterator[tuple[Interface, IPv4Interface | IPv6Interface]]:
    """Yield the addresses at which another host may reach this one, IPv4 first."""
    for version in (4, 6):
        for interface in host.interfaces:
            if not interface.up or interface.kind in (LOOPBACK, BRIDGE):
                continue
            for text in interface.addresses:
                found = ip_interface(text)
                if found.version == version and _means_the_same_everywhere(found.ip):
                    yield interface, found


def best_address(host: HostNetworks) -> str:
    """Return the address at which a host is most likely reachable if its name doesn't resolve; empty if there is none."""
    found = sorted(usable(host), key=lambda each: (each[0].kind == TUNNEL, -each[0].speed, each[1].version))
    return str(found[0][1].ip) if found else ""


def shared_networks(hosts: Sequence[HostNetworks], preferred: str = "") -> list[Shared]:
    """Return the networks that all hosts share, the best first.

    The best network is the one whose slowest host has the fastest link; among equally fast ones, that of the preferred address, then IPv4,
    then the order of rank 0's interfaces. Tunnels are last. A network in which two hosts have the same address is not shared: Docker's, for
    instance, which each host has for itself.

    Args:
        hosts: `distinct` hosts, rank 0's first.
        preferred: the address to which the name of rank 0's host resolves, or that of its default route.
    """
    found = [shared for own in usable(hosts[0]) if (shared := _share(hosts, own)) is not None]

    def rank(shared: Shared) -> tuple[bool, int, bool, int]:
        network = ip_network(shared.network)
        return shared.tunnel, -shared.speed, not (preferred and ip_address(preferred) in network), network.version

    best: dict[str, Shared] = {}
    for shared in sorted(found, key=lambda one: (*rank(one), one.address != preferred)):
        best.setdefault(shared.network, shared)
    return list(best.values())


def choose(hosts: Sequence[HostNetworks], preferred: str, setting: str | None = None) -> Choice:
    """Choose the address at which the ranks of other hosts reach rank 0.

    Args:
        hosts: `distinct` hosts, two at least, rank 0's first.
        preferred: the address to which the name of rank 0's host resolves, or that of its default route; empty if there is none.
        setting: the user's setting: an interface, a network, or an address of rank 0's host.

    Raises:
        UsageError: there is no such network, or not on all hosts.
    """
    if setting is not None:
        return _chosen(hosts, setting)
    if found := shared_networks(hosts, preferred):
        first = found[0]
        among = f"of {len(found)} that all hosts share" if len(found) > 1 else "which all hosts share"
        line = f"network: {first.network} ({described_link(first.interface, first.speed)})"
        line += f"{' ' if len(found) > 1 else ', '}{among}; --liveness-network chooses another"
        return Choice(first.address, first.network, line)
    for interface, own in sorted(usable(hosts[0]), key=lambda each: str(each[1].ip) != preferred):
        if all(_has_way(host, own.ip) for host in hosts[1:]) and not _twice(hosts, own.network):
            line = f"network: none that all hosts share; rank 0 is reached at {own.ip} ({interface.name}) by the hosts' routes"
            return Choice(str(own.ip), "", f"{line}; --liveness-network chooses another address")
    raise UsageError(
        f"the hosts of this worker share no network\n{_listed(hosts)}",
        expected="a network in which each host has an address of its own, on an interface that is up, or routes from all hosts to rank 0's; "
        "loopback, link-local addresses and bridges of containers don't count",
        fix=f"ip address, ip route: give the hosts addresses in one network, or name an interface or a network by {SETTING}",
    )


def _chosen(hosts: Sequence[HostNetworks], setting: str) -> Choice:
    first = _named(hosts[0], setting)
    if not first:
        raise UsageError(
            f"rank 0's host {hosts[0].host} has no address by {setting}\n{_listed(hosts[:1])}",
            expected="an interface, a network or an address of every host's, on an interface that is up, and neither loopback nor link-local",
            fix=f"correct {SETTING}",
        )
    name, own = first[0]
    single = "/" not in setting and name != setting
    network = own.network if single or name == setting else ip_network(setting, strict=False)
    if single:
        away = [host for host in hosts[1:] if not (_inside(host, own) or _has_way(host, own.ip))]
    else:
        away = [host for host in hosts[1:] if not (_named(host, setting) or _has_way(host, own.ip, by_default=False))]
    if away:
        who = ", ".join(host.host for host in away[:_MOST_HOSTS]) + (" …" if len(away) > _MOST_HOSTS else "")
        raise UsageError(
            f"{len(away)} of {len(hosts)} hosts have no address by {setting}: {who}\n{_listed(away)}",
            expected="an interface or a network that every host of the worker has, up, and neither loopback nor link-local",
            fix=f"set {SETTING} to one that all have, or leave it out",
        )
    if twice := _twice(hosts, own.network):
        raise UsageError(
            f"{setting} is not one network: {' and '.join(twice[1:])} both have {twice[0]}",
            expected="a network in which each host has an address of its own",
            fix=f"set {SETTING} to another, or leave it out",
        )
    return Choice(
        str(own.ip), str(network) if _inside_all(hosts, network) else "", f"network: {setting}, rank 0 at {own.ip}"
    )


def _share(hosts: Sequence[HostNetworks], own: tuple[Interface, IPv4Interface | IPv6Interface]) -> Shared | None:
    interface, address = own
    network = address.network
    if network.num_addresses == 1 or _twice(hosts, network):
        return None
    speed, tunnel = interface.speed, interface.kind == TUNNEL
    for host in hosts[1:]:
        links = [link for link, theirs in usable(host) if theirs.ip in network and address.ip in theirs.network]
        if not links:
            return None
        best = min(links, key=lambda link: (link.kind == TUNNEL, -link.speed))
        speed, tunnel = min(speed, best.speed), tunnel or best.kind == TUNNEL
    return Shared(str(network), interface.name, str(address.ip), speed, tunnel)


def _twice(hosts: Sequence[HostNetworks], network: Network) -> tuple[str, str, str] | None:
    """Return an address that two hosts have in a network, with the hosts' names."""
    seen: dict[str, str] = {}
    for host in hosts:
        own = {str(found.ip) for each in host.interfaces for found in map(ip_interface, each.addresses)}
        for text in own:
            if ip_address(text) in network and seen.setdefault(text, host.host) != host.host:
                return text, seen[text], host.host
    return None


def _named(host: HostNetworks, setting: str) -> list[tuple[str, IPv4Interface | IPv6Interface]]:
    """Return a host's addresses of an interface or in a network, IPv4 first. The user may name a bridge."""
    found = [
        (each.name, address)
        for each in host.interfaces
        for address in map(ip_interface, each.addresses)
        if each.up and each.kind != LOOPBACK and _means_the_same_everywhere(address.ip)
    ]
    found.sort(key=lambda each: each[1].version)
    if any(each.name == setting for each in host.interfaces):
        return [each for each in found if each[0] == setting]
    try:
        network = ip_network(setting.partition("%")[0], strict=False)
    except ValueError:
        return []
    return [each for each in found if each[1].ip in network]


def _inside(host: HostNetworks, own: IPv4Interface | IPv6Interface) -> bool:
    return any(theirs.ip in own.network for _, theirs in usable(host))


def _inside_all(hosts: Sequence[HostNetworks], network: Network) -> bool:
    return all(any(theirs.ip in network for _, theirs in usable(host)) for host in hosts)


def _has_way(host: HostNetworks, address: Address, *, by_default: bool = True) -> bool:
    routes = (ip_network(route) for route in host.routes)
    return any(address in route and (by_default or route.prefixlen) for route in routes)


def _means_the_same_everywhere(address: Address) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


def _listed(hosts: Sequence[HostNetworks]) -> str:
    lines = [
        f"  {host.host}: " + (", ".join(filter(None, map(_described, host.interfaces))) or "no address")
        for host in hosts[:_MOST_HOSTS]
    ]
    if len(hosts) > _MOST_HOSTS:
        lines.append(f"  and {len(hosts) - _MOST_HOSTS} more")
    return "\n".join(lines)


def _described(interface: Interface) -> str:
    if not interface.addresses or interface.kind == LOOPBACK:
        return ""
    notes = [note for note in (interface.kind, "" if interface.up else "down") if note]
    return f"{interface.name} {' '.join(interface.addresses)}" + (f" ({', '.join(notes)})" if notes else "")


def described_link(name: str, speed: int) -> str:
    """Return a link's name and, if it is known, its speed: ``ib0, 200 Gb/s``."""
    return f"{name}, {speed / 1000:g} Gb/s" if speed else name
