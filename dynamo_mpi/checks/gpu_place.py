# SPDX-License-Identifier: Apache-2.0
"""Where a GPU is: the CPUs and the memory node next to it, from sysfs.

A NUMA node may have memory and no CPUs. On GB200 and GH200 the memory of each GPU is such a node; the kernel would fill it with a process's
memory, or with files, once the CPUs' nodes are full, and the engine would find less room for its KV cache. Such a node is never chosen.
"""

from __future__ import annotations

import os

from dynamo_mpi.checks.nvml import optional, to_text
from dynamo_mpi.common.affinity import format_list, parse_list
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class GpuPlace(NamedTuple):
    """A GPU's place.

    Args:
        address: its PCI address, as sysfs has it.
        node: the NUMA node of its CPUs; -1 if it isn't known, as in many virtual machines.
        cpus: the CPUs next to it, as a list: ``0-31,64-95``; empty if they aren't known.
        host_nodes: where the GPUs' own memory is NUMA nodes too, all the others, as a list; otherwise empty.
    """

    address: str
    node: int = -1
    cpus: str = ""
    host_nodes: str = ""

    def pack(self) -> str:
        """Write it as one word."""
        return f"{self.address}|{self.node}|{self.cpus}|{self.host_nodes}"

    @classmethod
    def unpack(cls, text: str) -> GpuPlace:
        """Read what `pack` wrote.

        Raises:
            ValueError: ``text`` isn't such a word.
        """
        address, node, cpus, host_nodes = text.split("|")
        parse_list(cpus)
        parse_list(host_nodes)
        return cls(address, int(node), cpus, host_nodes)


class NumaNode(NamedTuple):
    """A NUMA node.

    Args:
        number: its number.
        cpus: its CPUs; empty for one that is memory only.
        distances: how far each node is, by number.
    """

    number: int
    cpus: frozenset[int]
    distances: dict[int, int]


def read_nodes(sys_dir: str = "/sys") -> tuple[NumaNode, ...]:
    """Read the NUMA nodes; empty if the kernel shows none.

    Args:
        sys_dir: where sysfs is mounted.
    """
    folder = os.path.join(sys_dir, "devices/system/node")
    try:
        numbers = sorted(parse_list(_text(os.path.join(folder, "online"))))
        return tuple(
            NumaNode(
                number,
                parse_list(_text(os.path.join(folder, f"node{number}", "cpulist"))),
                dict(
                    zip(
                        numbers,
                        map(int, _text(os.path.join(folder, f"node{number}", "distance")).split()),
                        strict=False,
                    )
                ),
            )
            for number in numbers
        )
    except (OSError, ValueError):
        return ()


def read_place(address: str, own_memory: int, nodes: Sequence[NumaNode], sys_dir: str = "/sys") -> GpuPlace:
    """Read one GPU's place. Never raises: what can't be read isn't known.

    Args:
        address: its PCI address.
        own_memory: the NUMA node that the GPU's own memory is; -1 if it is none.
        nodes: from `read_nodes`.
        sys_dir: where sysfs is mounted.
    """
    folder = os.path.join(sys_dir, "bus/pci/devices", address)
    try:
        node, local = (
            int(_text(os.path.join(folder, "numa_node"))),
            parse_list(_text(os.path.join(folder, "local_cpulist"))),
        )
    except (OSError, ValueError):
        node, local = -1, frozenset()
    number, cpus = locate(node, local, nodes)
    hosts = format_list(one.number for one in nodes if one.cpus) if own_memory >= 0 else ""
    return GpuPlace(address, number, format_list(cpus), hosts)


def locate(node: int, local: frozenset[int], nodes: Sequence[NumaNode]) -> tuple[int, frozenset[int]]:
    """Return a device's node, always one with CPUs, and its CPUs; -1 and none if they aren't known. Pure.

    Args:
        node: the node that the kernel gives for the device; -1 if its firmware doesn't say.
        local: the CPUs that the kernel gives for it; all of them if its firmware doesn't say.
        nodes: all NUMA nodes.
    """
    hosts = {one.number: one for one in nodes if one.cpus}
    if node not in hosts:
        there = next((one for one in nodes if one.number == node), None)
        if there is not None and hosts:  # memory only
            node = min(hosts, key=lambda number: (there.distances.get(number, 255), number))
        elif len(hosts) == 1:
            node = next(iter(hosts))
        else:
            return -1, frozenset()
    return node, local & hosts[node].cpus or hosts[node].cpus


def pci_address(bus_id: str | bytes) -> str:
    """Return a PCI address as sysfs has it, from NVML's, whose domain has eight digits: ``00000000:3B:00.0``.

    Raises:
        ValueError: it isn't one.
    """
    domain, _, rest = to_text(bus_id).lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def place_by_nvml(nvml: Any, handle: Any, nodes: Sequence[NumaNode]) -> GpuPlace | None:
    """Read the place of a GPU of NVML's; None if its address can't be read. Never raises an `Exception`.

    Args:
        nvml: nvidia-ml-py, open.
        handle: NVML's handle of the GPU.
        nodes: from `read_nodes`.
    """
    try:
        address = pci_address(nvml.nvmlDeviceGetPciInfo(handle).busId)
    except Exception:
        return None
    own = optional(nvml, "nvmlDeviceGetNumaNodeId", handle)  # most GPUs' memory is none
    return read_place(address, -1 if own is None else int(own), nodes)


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as stream:
        return stream.read().strip()
