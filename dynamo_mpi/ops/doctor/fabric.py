# SPDX-License-Identifier: Apache-2.0
"""Doctor's checks of the network: RDMA devices, interfaces, and settings of UCX, NCCL and Open MPI that name missing ones.

Only `read_rdma_ports` and `missing_for_ucx` do I/O.
"""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.checks.rank_facts import lines
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.host_address import host_address, interface_addresses
from dynamo_mpi.common.interfaces import host_networks
from dynamo_mpi.common.networks import HostNetworks, best_address, described_link, usable
from dynamo_mpi.layout.format import listed
from dynamo_mpi.ops.doctor.check import Check, Context, Probe, Section, error_or_warning, of_error, ok, skipped, warning

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence


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


_DEVICE_FILES = "/dev/infiniband"
_NCCL_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_OPEN_MPI = (
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_oob_tcp_if_include",
    "PRTE_MCA_prte_if_include",
    "PMIX_MCA_ptl_base_if_include",
)
_OURS = ("DYN_MPI_LIVENESS_NETWORK", "DYN_MPI_KV_NETWORK")


def check_rdma(context: Context) -> Iterator[Check]:
    """Check the RDMA devices."""
    yield from judge_rdma(read_rdma_ports(), context.environ, usable=os.path.isdir(_DEVICE_FILES))


def judge_rdma(ports: Sequence[RdmaPort], environ: Mapping[str, str], *, usable: bool) -> Iterator[Check]:
    """Evaluate the RDMA ports.

    Args:
        ports: of all devices.
        environ: has the settings that may name devices.
        usable: whether their device files exist; a container may hide them.
    """
    if not ports:
        yield skipped("infiniband", "no RDMA device: ranks of several nodes reach each other by TCP")
        return
    found = lines([f"{port.name} {port.layer} {port.state} {port.rate}" for port in ports])
    named = [port for name in ("UCX_NET_DEVICES", "NCCL_IB_HCA") for port in named_ports(environ.get(name, ""), ports)]
    down = [port.name for port in dict.fromkeys(named) if port.state != "ACTIVE"]
    fix = "ibstat, ip link; cables, and the subnet manager of an InfiniBand fabric"
    if down:
        yield warning("infiniband", found, f"{listed(down)}, which UCX_NET_DEVICES or NCCL_IB_HCA names, active", fix)
    elif not any(port.state == "ACTIVE" for port in ports):
        yield warning("infiniband", found, "an active port: NCCL and UCX fall back to TCP", fix)
    else:
        yield ok("infiniband", found)
    if not usable:
        needed = "RDMA's device files: NCCL and UCX fall back to TCP without"
        yield warning(
            "rdma-devices",
            f"{_DEVICE_FILES} isn't here",
            needed,
            "mount it into the container: docker run --device=/dev/infiniband; Pyxis does by itself where enroot's hook is on",
        )


def check_interfaces(context: Context) -> Iterator[Check]:
    """Check the interfaces, and the address that is published to other hosts."""
    found = interface_addresses()
    yield ok("interfaces", "; ".join(f"{name} {listed(addresses)}" for name, addresses in found.items()) or "none")
    yield judge_address(host_address(None, "--liveness-network"))
    yield from judge_networks(host_networks(), context.environ, rdma=bool(read_rdma_ports()))


def judge_networks(own: HostNetworks, environ: Mapping[str, str], *, rdma: bool) -> Iterator[Check]:
    """Report which of several interfaces a multi-node worker uses, and the settings for NCCL and UCX to use the same.

    Args:
        own: this host's networks.
        environ: has the settings that may select one already.
        rdma: whether there are RDMA devices, which UCX prefers by itself.
    """
    links = {interface.name: interface for interface, _ in usable(own)}
    if len(links) < 2:
        return
    address = best_address(own)
    best = next(link for link, found in usable(own) if str(found.ip) == address)
    wanted = {"NCCL_SOCKET_IFNAME": f"={best.name}"} | ({} if rdma else {"UCX_NET_DEVICES": best.name})
    unsaid = [f"{name}={value}" for name, value in wanted.items() if not environ.get(name)]
    found = f"of {listed(links)} a worker takes {described_link(best.name, best.speed)}, where all its hosts share that network"
    yield ok("network", found + (f"; the same for NCCL and UCX: {' '.join(unsaid)}" if unsaid else ""))


def judge_address(address: str) -> Check:
    """Evaluate the address to which this host's own name resolves."""
    if not ip_address(address).is_loopback:
        return ok("address", f"{address}, where rank 0 listens by default for ranks of this host")
    return warning(
        "address",
        f"this host has no address but {address}",
        "one that other hosts reach, for a worker of several hosts",
        "--liveness-network and --kv-network select another; check ip address and this host's line of /etc/hosts",
    )


def check_named(context: Context) -> Iterator[Check]:
    """Check the devices that settings name."""
    interfaces = tuple(interface_addresses())
    checks = list(judge_named(context.environ, interfaces, read_rdma_ports(), in_rank=context.in_rank))
    for name in _OURS:
        if value := context.environ.get(name):
            try:
                checks.append(ok(name, f"{value} is {host_address(value, name)} here"))
            except UsageError as problem:
                checks.append(of_error(name, problem, fatal=context.in_rank))
    yield from checks or [skipped("named", "no setting of UCX, NCCL, MPI or ours names a network device")]


def judge_named(
    environ: Mapping[str, str], interfaces: Collection[str], ports: Sequence[RdmaPort], *, in_rank: bool
) -> Iterator[Check]:
    """Evaluate every setting that names a device; on a login node, which has other devices, a missing one is no error."""
    devices = {port.device for port in ports}
    missing: dict[str, list[str]] = {}
    for name in _NCCL_INTERFACES:
        if value := environ.get(name):
            missing[name] = missing_for_nccl(value, interfaces)
    if value := environ.get("NCCL_IB_HCA"):
        missing["NCCL_IB_HCA"] = missing_for_nccl(value, devices)
    if value := environ.get("UCX_NET_DEVICES"):
        missing["UCX_NET_DEVICES"] = missing_for_ucx(value, interfaces, ports)
    for name in _OPEN_MPI:
        if value := environ.get(name):
            missing[name] = missing_for_open_mpi(value, interfaces)
    for name, absent in missing.items():
        if not absent:
            yield ok(name, environ[name])
            continue
        there = f"interfaces {listed(interfaces)}" + (
            f"; devices {listed(port.name for port in ports)}" if ports else "; no RDMA device"
        )
        yield error_or_warning(
            name,
            f"{name}={environ[name]}: {listed(absent)} isn't here ({there})",
            "devices of this host, the same on each node of a worker",
            f"correct {name}, or unset it",
            fatal=in_rank,
        )


SECTION = Section(
    "fabric",
    (
        Probe("infiniband", check_rdma),
        Probe("interfaces", check_interfaces),
        Probe("named", check_named),
    ),
)
