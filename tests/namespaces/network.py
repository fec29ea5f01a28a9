# SPDX-License-Identifier: Apache-2.0
"""What runs as a host's PID 1 needs to become a host, and the one above it to build the network between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import ClusterError

NODE_NAMESPACES = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
"""The words before a host's PID 1, behind ``ip netns exec NAME``."""


def command(*argv: str | Path) -> None:
    """Run a tool that is expected to succeed.

    Raises:
        ClusterError: it failed; its own words.
    """
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout.strip()}")


def become_host(name: str, hosts: Path) -> None:
    """Take on a name, an /etc/hosts, and a /dev/shm of its own, which Open MPI needs to distinguish hosts.

    Args:
        name: the host's.
        hosts: file that becomes /etc/hosts.
    """
    socket.sethostname(name)
    command("mount", "--bind", hosts, "/etc/hosts")
    command("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    command("ip", "link", "set", "lo", "up")


def keep_names_apart() -> None:
    """Give the names of network namespaces a folder of their own, so that they end with the caller's and collide with no other's."""
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "tmpfs", "/run/netns")


def add_bridge(bridge: str, address: str | None = None) -> None:
    """Make a bridge in the caller's network, with an address (``1.2.3.4/24``) or without."""
    command("ip", "link", "add", bridge, "type", "bridge")
    if address:
        command("ip", "address", "add", address, "dev", bridge)
    command("ip", "link", "set", bridge, "up")


def add_cable(bridge: str, cable: str, network: str, interface: str, address: str) -> None:
    """Connect a named network namespace with a bridge.

    Args:
        bridge: in the caller's network.
        cable: name of the caller's end.
        network: the namespace.
        interface: name of its end.
        address: of its end (``1.2.3.4/24``).
    """
    command("ip", "link", "add", cable, "type", "veth", "peer", "name", interface, "netns", network)
    command("ip", "link", "set", cable, "master", bridge, "up")
    command("ip", "-n", network, "address", "add", address, "dev", interface)
    command("ip", "-n", network, "link", "set", interface, "up")


def host_command(network: str, first: Sequence[str]) -> list[str]:
    """Return the command that runs ``first`` as PID 1 of a host in a named network namespace."""
    return ["ip", "netns", "exec", network, *NODE_NAMESPACES, *first]


def reap_until_end_of(essential: dict[int, str]) -> NoReturn:
    """Do PID 1's duty, until one of the processes that the host is there for has ended."""
    while True:
        pid, status = os.wait()
        if pid in essential:
            sys.exit(f"{essential[pid]} ended with code {os.waitstatus_to_exitcode(status)}")
