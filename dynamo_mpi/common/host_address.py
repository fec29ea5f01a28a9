# SPDX-License-Identifier: Apache-2.0
"""Finds the address at which a server of this host listens so that other hosts can reach it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.interfaces import host_networks, read_interfaces
from dynamo_mpi.common.networks import best_address
from dynamo_mpi.common.ports import ANY_ADDRESS, LOOPBACK, is_free

Address = IPv4Address | IPv6Address
# addresses that are never routed: connecting a datagram socket sends nothing, but selects the source address
_ELSEWHERE = ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1"))
_DISCARD_PORT = 9


def host_address(choice: str | None, setting: str) -> str:
    """Return an address of this host: the first IPv4 address that fits, or else the first IPv6 address.

    Args:
        choice: an interface (``ib0``), a network in which this host has an address (``10.1.0.0/16``, ``fd00::/64``), or an address. None:
            the address to which this host's name resolves; if that is loopback, the source address of its default route, or else an
            address of its fastest interface; loopback if it has no other.
        setting: the setting of the choice, for the error.

    Raises:
        UsageError: this host has no such address, or only a link-local one.
    """
    if choice is None:
        return _own_address()
    found = interface_addresses()
    fitting = _fitting(choice, found)
    if reachable := [address for address in fitting if not _is_link_local(address)]:
        return str(reachable[0])
    if fitting:
        raise UsageError(
            f"by {choice} this host has only {fitting[0]}, a link-local address",
            expected="an address that is valid on every host: a link-local one is valid in one network segment only",
            fix=f"give the interface another address, or set {setting} to another",
        )
    raise UsageError(
        f"this host has no address by {choice}; it has "
        + (", ".join(f"{name} {' '.join(map(str, addresses))}" for name, addresses in found.items()) or "none"),
        expected="an interface, a network or an address of this host",
        fix=f"correct {setting}",
    )


def service_address(choice: str | None, setting: str) -> str:
    """Return an address of this host like `host_address`; ``choice`` may also be a name of this host.

    Raises:
        UsageError: this host has no such address.
    """
    if choice is None or choice == socket.gethostname():
        return _own_address()
    try:
        return host_address(choice, setting)
    except UsageError:
        for address in _resolved(choice):
            if address not in ANY_ADDRESS and _is_own(address):
                return address
        raise


def is_here(host: str) -> bool:
    """Return whether a name or an address is one of this host."""
    return any(map(_is_own, _resolved(host)))


def _is_own(address: str) -> bool:
    return is_free(0, address)  # a socket can only be bound to an address of this host


def _resolved(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # unknown or invalid name
        return []
    return [str(place[0]) for _, _, _, _, place in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]


def interface_addresses() -> dict[str, list[Address]]:
    """Return this host's interfaces with their addresses, IPv4 first.

    Raises:
        OSError: they can't be read.
    """
    found: dict[str, list[Address]] = {}
    for interface in read_interfaces():
        addresses = (ip_interface(address).ip for address in interface.addresses)
        found[interface.name] = sorted(addresses, key=lambda address: address.version)
    return found


def _fitting(choice: str, found: dict[str, list[Address]]) -> Sequence[Address]:
    if choice in found:
        return found[choice]
    try:
        network = ip_network(choice.partition("%")[0], strict=False)
    except ValueError:
        return ()
    return [address for addresses in found.values() for address in addresses if address in network]


def _is_link_local(address: Address) -> bool:
    return isinstance(address, IPv6Address) and address.is_link_local


def known_address() -> str:
    """Return the address to which this host's name resolves or, if that is loopback, the source address of its default route; empty if there
    is neither."""
    with contextlib.suppress(OSError, UnicodeError):
        known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        addresses = [
            ip_address(str(place[0])) for *_, place in sorted(known, key=lambda info: info[0] != socket.AF_INET)
        ]
        for address in addresses:
            if not (address.is_loopback or _is_link_local(address)):
                return str(address)
    for family, elsewhere in _ELSEWHERE:
        if found := source_address(family, elsewhere):
            return found
    return ""


def source_address(family: int, elsewhere: str) -> str:
    """Return this host's source address on the route to another, without sending anything; empty if there is no route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, _DISCARD_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _own_address() -> str:
    # a host of a closed network may have neither a resolvable name nor a default route
    return known_address() or best_address(host_networks()) or LOOPBACK
