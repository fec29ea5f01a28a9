# SPDX-License-Identifier: Apache-2.0
"""Bad links between the cluster's nodes: slow, lossy, cut. By ``tbf`` and a BPF filter of ``tc``: not every kernel has ``netem``."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from .cluster.settings import LOGIN, cable
from .session import SlurmSession

# classic BPF: where an IPv4 packet has its sender, behind the Ethernet header; the kernel's random numbers (SKF_AD_OFF + SKF_AD_RANDOM)
_SENDER, _RANDOM = 26, 0xFFFFF038
_DROP, _PASS = 2, 0xFFFFFFFF


@contextmanager
def slow_node(slurm: SlurmSession, node: str, rate: str) -> Iterator[None]:
    """Let a node send and receive at ``rate`` only, as tc writes it: ``50mbit``."""
    shape = ("root", "tbf", "rate", rate, "burst", "64k", "latency", "400ms")
    ends = ((node, "eth0"), (LOGIN, cable(node)))
    try:
        for host, interface in ends:
            _tc(slurm, host, "qdisc", "add", "dev", interface, *shape)
        yield
    finally:
        for host, interface in ends:
            _tc(slurm, host, "qdisc", "del", "dev", interface, "root")


@contextmanager
def lossy_link(slurm: SlurmSession, one: str, other: str, share: float) -> Iterator[None]:
    """Lose a share of the packets that two nodes send each other; 1 is a cut that neither end gets notice of."""
    try:
        for sender, receiver in ((one, other), (other, one)):
            # where it arrives: what is dropped where it leaves, the sender's TCP would know
            _tc(slurm, receiver, "qdisc", "add", "dev", "eth0", "clsact")
            program = _losing(slurm.addresses[sender], share)
            _tc(slurm, receiver, "filter", "add", "dev", "eth0", "ingress", "bpf", "da", "bytecode", program)
        yield
    finally:
        for node in (one, other):
            _tc(slurm, node, "qdisc", "del", "dev", "eth0", "clsact")


def _losing(address: str, share: float) -> str:
    """Write the program that loses packets: how many instructions, then each as ``code true false value``."""
    sender, least = int(ipaddress.ip_address(address)), round((1 - share) * (2**32 - 1))
    steps = (
        f"32 0 0 {_SENDER}",
        f"21 0 3 {sender}",
        f"32 0 0 {_RANDOM}",
        f"53 0 1 {least}",
        f"6 0 0 {_DROP}",
        f"6 0 0 {_PASS}",
    )
    return f"{len(steps)},{','.join(steps)}"


def _tc(slurm: SlurmSession, host: str, *words: str) -> None:
    done = slurm.exec("tc", *words, host=host)
    assert done.returncode == 0, f"tc {' '.join(words)} on {host}: {done.stderr}"
