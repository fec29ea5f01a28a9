# SPDX-License-Identifier: Apache-2.0
"""What runs inside the cluster's namespaces: PID 1 of the login node and of each compute node.

Started by ``cluster.Cluster``, never by people, with the verbs ``login STATE``, ``node STATE NAME`` and
``power-on STATE NAME``. The login node's PID 1 builds the network, starts the daemons and the nodes, says ``ready`` on stdout
and then only reaps; a node's PID 1 lives as long as its slurmd. The kernel kills what is left in a PID namespace when its
PID 1 ends.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tests.namespaces.anchor import READY
from tests.namespaces.errors import ClusterError
from tests.namespaces.network import (
    add_bridge,
    add_cable,
    become_host,
    command,
    host_command,
    keep_names_apart,
    reap_until_end_of,
)

from .config import PMIX_LIBRARY
from .entry import inside_command, inside_environment
from .settings import LOGIN, SLURMCTLD_PORT, ClusterSettings, cable

DAEMON_TIMEOUT = 20.0
"""Seconds that a daemon may take to listen."""
BRIDGE = "br0"


def daemon(settings: ClusterSettings, name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a long-lived process in its own session, its output in the logs."""
    with (settings.logs / f"{name}.out").open("ab") as log:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=inside_environment(settings.state),
            start_new_session=True,
        )


def wait_for(what: str, is_there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll until a daemon offers its service.

    Raises:
        ClusterError: the daemon ended, or did not come in time.
    """
    deadline = time.monotonic() + DAEMON_TIMEOUT
    while not is_there():
        if process.poll() is not None:
            raise ClusterError(f"{what}: the daemon ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not there after {DAEMON_TIMEOUT:g} s")
        time.sleep(0.02)


def listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def build_network(settings: ClusterSettings) -> None:
    """A bridge in the login node, and per compute node a named network namespace with a cable to it."""
    keep_names_apart()
    add_bridge(BRIDGE, f"{settings.addresses[LOGIN]}/24")
    for name in settings.node_names:
        command("ip", "netns", "add", name)
        add_cable(BRIDGE, cable(name), name, "eth0", f"{settings.addresses[name]}/24")


def power_on(settings: ClusterSettings, name: str) -> None:
    """Start a compute node; it becomes a child of the login node's PID 1 when the caller ends."""
    daemon(settings, f"node.{name}", host_command(name, inside_command("node", settings.state, name)))


def login(settings: ClusterSettings) -> NoReturn:
    """PID 1 of the login node."""
    become_host(LOGIN, settings.hosts)
    command("mount", "--bind", settings.pmix_library, PMIX_LIBRARY)
    build_network(settings)
    munge_folder = settings.munge_socket.parent
    munged = daemon(
        settings,
        "munged",
        [
            "munged",
            "--foreground",
            "--force",  # it dislikes root and folders under /tmp, sensibly for anything but a test
            f"--key-file={settings.munge_key}",
            f"--socket={settings.munge_socket}",
            f"--pid-file={munge_folder / 'pid'}",
            f"--seed-file={munge_folder / 'seed'}",
            f"--log-file={settings.logs / 'munged.log'}",
        ],
    )
    wait_for("munged's socket", settings.munge_socket.is_socket, munged)
    slurmctld = daemon(settings, "slurmctld", ["slurmctld", "-D", "-c", "-i", "-f", str(settings.slurm_conf)])
    wait_for("slurmctld's port", lambda: listens((settings.addresses[LOGIN], SLURMCTLD_PORT)), slurmctld)
    for name in settings.node_names:
        power_on(settings, name)
    print(READY, flush=True)
    reap_until_end_of({munged.pid: "munged", slurmctld.pid: "slurmctld"})


def node(settings: ClusterSettings, name: str) -> NoReturn:
    """PID 1 of a compute node."""
    become_host(name, settings.hosts)
    for folder in ("spool", "tmp"):
        (settings.state / f"{folder}.{name}").mkdir(exist_ok=True)
    slurmd = daemon(settings, f"slurmd.{name}", ["slurmd", "-D", "-N", name, "-f", str(settings.slurm_conf)])
    reap_until_end_of({slurmd.pid: "slurmd"})


def main(verb: str, state: str, *names: str) -> None:
    settings = ClusterSettings.load(Path(state))
    try:
        if verb == "login":
            login(settings)
        elif verb == "node":
            node(settings, *names)
        elif verb == "power-on":
            power_on(settings, *names)
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
