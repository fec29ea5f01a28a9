# SPDX-License-Identifier: Apache-2.0
"""Reads this host's network interfaces: rtnetlink(7) for addresses and flags, /sys for link speeds, /proc for routes.

The first rank of each node imports it before the preflight result: one module, no package.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from dynamo_mpi.common.networks import HostNetworks, Interface, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_GET_LINK, _GET_ADDRESS = 18, 22
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE, _ERROR = 3, 2
_HEADER, _LINK, _ADDRESS, _ATTRIBUTE = (struct.Struct(layout) for layout in ("=IHHII", "=BxHiII", "=BBBBi", "=HH"))
_NAME, _LINK_INFO, _INFO_KIND = 3, 18, 1
_PEER, _LOCAL, _FLAGS = 1, 2, 8
# IFF_UP and IFF_RUNNING, and IFF_POINTOPOINT; ARPHRD_LOOPBACK; of if_addr.h: the address is a duplicate, or not checked yet
_UP, _POINT_TO_POINT, _TO_LOOPBACK, _UNUSABLE = 0x41, 0x10, 772, 0x08 | 0x40
_TUNNELS = ("tun", "wireguard", "ppp", "gre", "ipip", "sit", "vti", "ip6tnl", "xfrm")
_ROUTE_UP, _ROUTE_REJECTS = 0x1, 0x200
_MOST_ROUTES = 64
_RECEIVE_BYTES = 1 << 18


def host_networks(host: str = "", sys: str = "/sys", proc: str = "/proc") -> HostNetworks:
    """Return this host's networks. Does not raise: what can't be read is omitted.

    Args:
        host: its name.
        sys: the directory of sysfs.
        proc: the directory of procfs.
    """
    interfaces: tuple[Interface, ...] = ()
    with contextlib.suppress(OSError, struct.error, ValueError):
        interfaces = read_interfaces(sys)
    return HostNetworks(host, _namespace(proc), interfaces, tuple(_routes(proc))[:_MOST_ROUTES])


def read_interfaces(sys: str = "/sys") -> tuple[Interface, ...]:
    """Return this host's interfaces that have an address, in the kernel's order.

    Args:
        sys: the directory of sysfs.

    Raises:
        OSError: they can't be read, for instance because too many files are open.
    """
    return tuple(_interfaces(sys))


def _interfaces(sys: str) -> Iterator[Interface]:
    addresses: dict[int, list[str]] = {}
    for body in _dump(_GET_ADDRESS):
        _, length, flags, _, index = _ADDRESS.unpack_from(body)
        found = dict(_attributes(body[_ADDRESS.size :]))
        if _FLAGS in found:
            (flags,) = struct.unpack_from("=I", found[_FLAGS])
        # of a point-to-point link, the first address is the peer's
        raw = found.get(_LOCAL, found.get(_PEER, b""))
        if len(raw) in (4, 16) and not flags & _UNUSABLE:
            addresses.setdefault(index, []).append(f"{ip_address(raw)}/{length}")
    for body in _dump(_GET_LINK):
        _, kind, index, flags, _ = _LINK.unpack_from(body)
        found = dict(_attributes(body[_LINK.size :]))
        name = found.get(_NAME, b"").rstrip(b"\0").decode("utf-8", "replace")
        info = (
            dict(_attributes(found.get(_LINK_INFO, b""))).get(_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace")
        )
        if index in addresses:
            yield Interface(
                name,
                tuple(addresses[index]),
                _speed(f"{sys}/class/net/{name}", index),
                flags & _UP == _UP,
                kind_of(
                    name,
                    loopback=kind == _TO_LOOPBACK,
                    bridge=info == "bridge",
                    tunnel=bool(flags & _POINT_TO_POINT) or info in _TUNNELS,
                ),
            )


def _dump(question: int) -> Iterator[bytes]:
    """Request all objects of a kind from the kernel, and yield each answer without its header."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(1.0)
        kernel.sendto(_HEADER.pack(_HEADER.size + 16, question, _DUMP, 1, 0) + bytes(16), (0, 0))
        while True:
            data = kernel.recv(_RECEIVE_BYTES)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return
                if kind == _ERROR or length < _HEADER.size:
                    raise OSError("the kernel doesn't list its interfaces")
                yield data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _speed(folder: str, index: int) -> int:
    """Return a link's speed in Mb/s; 0 if it isn't known, or if /sys belongs to another network namespace."""
    if _word(f"{folder}/ifindex") != str(index):
        return 0
    speed = _word(f"{folder}/speed")
    return int(speed) if speed.isdecimal() and int(speed) < 1 << 31 else 0


def _namespace(proc: str) -> str:
    """Return a globally unique name of this network namespace; empty if it isn't known."""
    boot = _word(f"{proc}/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return boot and f"{boot} {os.stat(f'{proc}/self/ns/net').st_ino}"
    return ""


def _routes(proc: str) -> Iterator[str]:
    """Yield the networks to which this host has a route, default routes first."""
    found = []
    for line in _text(f"{proc}/net/route").splitlines()[1:]:
        # name, destination, gateway, flags, three counters, mask, in host byte order
        row = line.split()
        if len(row) > 7 and _goes(int(row[3], 16)):
            address, mask = (struct.pack("=I", int(row[at], 16)) for at in (1, 7))
            found.append((int.from_bytes(mask, "big").bit_count(), address))
    for line in _text(f"{proc}/net/ipv6_route").splitlines():
        # destination, its prefix, source, its prefix, next hop, metric, two counters, flags, name
        row = line.split()
        if len(row) > 9 and row[9] != "lo" and _goes(int(row[8], 16)):
            found.append((int(row[1], 16), bytes.fromhex(row[0])))
    for length, address in sorted(found):
        network = ip_network((address, length))
        if not network.is_link_local and not network.is_multicast:
            yield str(network)


def _goes(flags: int) -> bool:
    return bool(flags & _ROUTE_UP) and not flags & _ROUTE_REJECTS


def _word(path: str) -> str:
    return _text(path).strip()


def _text(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return stream.read().decode("ascii", "replace")
    except OSError:  # missing, or the link has no speed
        return ""
