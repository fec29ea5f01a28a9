# SPDX-License-Identifier: Apache-2.0
"""The address at which something here listens: one of this host's, which other hosts can reach."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from dynamo_mpi.errors import UsageError
from dynamo_mpi.services.ports import ANY_ADDRESS, LOOPBACK, is_free

Address = IPv4Address | IPv6Address
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_UNUSABLE_FLAGS = 0x08 | 0x40  # of if_addr.h: somebody else has it, or nobody knows yet
# of blocks that are never routed: connecting a datagram socket sends nothing, and chooses the way that others would be reached by
_ELSEWHERE = ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1"))
_DISCARD_PORT = 9


def host_address(choice: str | None, setting: str) -> str:
    """Return an address of this host: the first IPv4 address that fits, or else the first IPv6 address.

    Args:
        choice: an interface (``ib0``), a network of which this host has an address (``10.1.0.0/16``, ``fd00::/64``), or an address. None:
            the one that this host's name stands for, or, where that is loopback, the one by which others are reached.
        setting: what the choice is made by, for the error.

    Raises:
        UsageError: this host has none like that, or only a link-local one.
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
            needed="an address that means the same on every host: a link-local one means a neighbour of whoever uses it",
            fix=f"give the interface another address, or set {setting} to another",
        )
    raise UsageError(
        f"this host has no address by {choice}; it has "
        + (", ".join(f"{name} {' '.join(map(str, addresses))}" for name, addresses in found.items()) or "none"),
        needed="an interface, a network or an address of this host",
        fix=f"correct {setting}",
    )


def service_address(choice: str | None, setting: str) -> str:
    """Return an address of this host, as `host_address` does, also by a name of this host.

    Raises:
        UsageError: this host has none like that.
    """
    if choice is None or choice == socket.gethostname():
        return _own_address()
    try:
        return host_address(choice, setting)
    except UsageError:
        for address in _resolved(choice):
            if address not in ANY_ADDRESS and is_free(0, address):  # port 0: it is an address of ours
                return address
        raise


def _resolved(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # no name, or none that a name can be
        return []
    return [str(place[0]) for _, _, _, _, place in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]


def interface_addresses() -> dict[str, list[Address]]:
    """Return this host's interfaces with their first IPv4 address (netdevice(7)) and their IPv6 addresses."""
    found: dict[str, list[Address]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            with contextlib.suppress(OSError):  # it has none
                found[name] = [IPv4Address(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])]
    with contextlib.suppress(OSError):  # a kernel without IPv6
        for name, address in _parse_ipv6(_IPV6_ADDRESSES.read_text(encoding="ascii")):
            found.setdefault(name, []).append(address)
    return found


def _parse_ipv6(table: str) -> list[tuple[str, IPv6Address]]:
    """Read the kernel's table: address, interface number, prefix, scope, flags and interface name, in hexadecimal."""
    rows = [line.split() for line in table.splitlines()]
    return [
        (row[5], IPv6Address(int(row[0], 16)))
        for row in rows
        if len(row) == 6 and not int(row[4], 16) & _UNUSABLE_FLAGS
    ]


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


def _own_address() -> str:
    with contextlib.suppress(OSError):
        known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        addresses = [
            ip_address(str(place[0])) for *_, place in sorted(known, key=lambda info: info[0] != socket.AF_INET)
        ]
        for address in addresses:
            if not (address.is_loopback or _is_link_local(address)):
                return str(address)
    for family, elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, _DISCARD_PORT))
            return str(probe.getsockname()[0])
    return LOOPBACK
