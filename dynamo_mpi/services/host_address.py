# SPDX-License-Identifier: Apache-2.0
"""The address at which something here listens: one of this host's, which other hosts can reach."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from dynamo_mpi.errors import UsageError
from dynamo_mpi.services.ports import ANY_ADDRESS, LOOPBACK, is_free

_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15
# of a block that is never routed: connecting a datagram socket sends nothing, and chooses the way that others would be reached by
_ELSEWHERE = ("198.51.100.1", 9)


def host_address(choice: str | None, setting: str) -> str:
    """Return an IPv4 address of this host.

    Args:
        choice: an interface (``ib0``), a network of which this host has an address (``10.1.0.0/16``), or an address. None: the one that
            this host's name stands for, or, where that is loopback, the one by which others are reached.
        setting: what the choice is made by, for the error.

    Raises:
        UsageError: this host has none like that.
    """
    if choice is None:
        return _own_address()
    found = interface_addresses()
    if choice in found:
        return found[choice]
    try:
        network = IPv4Network(choice, strict=False)
    except (AddressValueError, NetmaskValueError, ValueError):
        network = None
    if network is not None:
        for address in found.values():
            if IPv4Address(address) in network:
                return address
    raise UsageError(
        f"this host has no IPv4 address by {choice}; it has "
        + (", ".join(f"{name} {address}" for name, address in found.items()) or "none"),
        needed="an interface, a network or an address of this host",
        fix=f"correct {setting}",
    )


def service_address(choice: str | None, setting: str) -> str:
    """Return an address of this host, as `host_address` does, also by a name of this host or as an IPv6 address.

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


def interface_addresses() -> dict[str, str]:
    """Return this host's interfaces with their first IPv4 address (netdevice(7))."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            with contextlib.suppress(OSError):  # it has none
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
    return found


def _own_address() -> str:
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not IPv4Address(address).is_loopback:
            return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            return LOOPBACK
        return str(probe.getsockname()[0])
