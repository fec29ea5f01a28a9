# SPDX-License-Identifier: Apache-2.0
"""Facts about network devices from the kernel, and their names in UCX, NCCL and Open MPI. Only the two readers do I/O."""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

INFINIBAND = Path("/sys/class/infiniband")
# UCX's names for all devices, or all of a kind
_UCX_ANY = ("all", "any")


class RdmaPort(NamedTuple):
    """One port of an RDMA device.

    Args:
        device: ``mlx5_0``.
        port: from 1.
        state: ``ACTIVE``, ``DOWN``, ``INIT`` …
        rate: ``400 Gb/sec (4X NDR)``.
        layer: ``InfiniBand`` or ``Ethernet``.
    """

    device: str
    port: int
    state: str
    rate: str
    layer: str

    @property
    def name(self) -> str:
        """Its name in UCX and NCCL: ``mlx5_0:1``."""
        return f"{self.device}:{self.port}"


def read_rdma_ports(folder: Path = INFINIBAND) -> tuple[RdmaPort, ...]:
    """Return the ports of all RDMA devices; empty if there are none."""
    found = []
    for device in _names(folder):
        for port in sorted((name for name in _names(folder / device / "ports") if name.isdecimal()), key=int):
            place = folder / device / "ports" / port
            state = _line(place / "state").rpartition(":")[2].strip() or "unknown"
            found.append(RdmaPort(device, int(port), state, _line(place / "rate"), _line(place / "link_layer")))
    return tuple(found)


def missing_for_nccl(value: str, there: Collection[str]) -> list[str]:
    """Return the entries of ``NCCL_SOCKET_IFNAME`` or ``NCCL_IB_HCA`` that match no device of this host.

    The value is a list; with ``^`` it lists exclusions, with ``=`` whole names, otherwise prefixes. A port may follow a device.
    """
    text = value.strip()
    if text.startswith("^"):
        return []
    exact = text.startswith("=")
    entries = [entry.strip() for entry in text.removeprefix("=").split(",") if entry.strip()]
    if exact:
        return [entry for entry in entries if entry.partition(":")[0] not in there]
    return [entry for entry in entries if not any(name.startswith(entry.partition(":")[0]) for name in there)]


def missing_for_ucx(value: str, interfaces: Collection[str], ports: Sequence[RdmaPort]) -> list[str]:
    """Return the entries of ``UCX_NET_DEVICES`` that don't exist on this host: interfaces, and devices with their port."""
    text = value.strip()
    if text.startswith("^"):
        return []
    there = {*interfaces, *(port.name for port in ports)}
    entries = (entry.strip() for entry in text.split(","))
    return [entry for entry in entries if entry and entry not in there and entry not in _UCX_ANY and "*" not in entry]


def missing_for_open_mpi(value: str, interfaces: Collection[str]) -> list[str]:
    """Return the entries of an ``…_if_include`` that are no interface of this host; networks aren't checked."""
    entries = (entry.strip() for entry in value.split(","))
    return [entry for entry in entries if entry and entry not in interfaces and not _is_network(entry)]


def named_ports(value: str, ports: Iterable[RdmaPort]) -> list[RdmaPort]:
    """Return the ports that a list of devices names, in NCCL's or UCX's syntax."""
    entries = [entry.strip() for entry in value.strip().removeprefix("=").split(",") if entry.strip()]
    if value.strip().startswith("^"):
        return []
    return [
        port
        for port in ports
        if any(port.name == entry if ":" in entry else port.device.startswith(entry) for entry in entries)
    ]


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
