# SPDX-License-Identifier: Apache-2.0
"""What runs inside the cluster's namespaces: PID 1 of the login node and of each compute node.

Started by ``cluster.Cluster``, never by people, with the verbs ``login STATE``, ``node STATE NAME`` and
``power-on STATE NAME``. The login node's PID 1 builds the network, starts the daemons and the nodes, says ``ready`` on stdout
and then only reaps; a node's PID 1 lives as long as its slurmd. The kernel kills what is left in a PID namespace when its
PID 1 ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .config import PMIX_LIBRARY
from .entry import inside_command, inside_environment
from .errors import ClusterError
from .settings import LOGIN, SLURMCTLD_PORT, ClusterSettings, cable

READY = "ready"
DAEMON_TIMEOUT = 20.0
"""Seconds that a daemon may take to listen."""
BRIDGE = "br0"


def command(*argv: str | Path) -> None:
    """Run a tool that is expected to succeed.

    Raises:
        ClusterError: it failed; its own words.
    """
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout.strip()}")


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


def become_host(settings: ClusterSettings, name: str) -> None:
    """Take on the host's name, its /etc/hosts and a /dev/shm of its own, which Open MPI needs to tell hosts apart."""
    socket.sethostname(name)
    command("mount", "--bind", settings.hosts, "/etc/hosts")
    command("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    command("ip", "link", "set", "lo", "up")


def build_network(settings: ClusterSettings) -> None:
    """A bridge in the login node, and per compute node a named network namespace with a cable to it.

    The names lie in the login node's own /run/netns, so they end with it and collide with nobody's.
    """
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
    command("ip", "link", "add", BRIDGE, "type", "bridge")
    command("ip", "address", "add", f"{settings.addresses[LOGIN]}/24", "dev", BRIDGE)
    command("ip", "link", "set", BRIDGE, "up")
    for name in settings.node_names:
        command("ip", "netns", "add", name)
        command("ip", "link", "add", cable(name), "type", "veth", "peer", "name", "eth0", "netns", name)
        command("ip", "link", "set", cable(name), "master", BRIDGE, "up")
        command("ip", "-n", name, "address", "add", f"{settings.addresses[name]}/24", "dev", "eth0")
        command("ip", "-n", name, "link", "set", "eth0", "up")


def power_on(settings: ClusterSettings, name: str) -> None:
    """Start a compute node; it becomes a child of the login node's PID 1 when the caller ends."""
    namespaces = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
    node = inside_command("node", settings.state, name)
    daemon(settings, f"node.{name}", ["ip", "netns", "exec", name, *namespaces, *node])


def login(settings: ClusterSettings) -> NoReturn:
    """PID 1 of the login node."""
    become_host(settings, LOGIN)
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
    become_host(settings, name)
    for folder in ("spool", "tmp"):
        (settings.state / f"{folder}.{name}").mkdir(exist_ok=True)
    slurmd = daemon(settings, f"slurmd.{name}", ["slurmd", "-D", "-N", name, "-f", str(settings.slurm_conf)])
    reap_until_end_of({slurmd.pid: "slurmd"})


def reap_until_end_of(essential: dict[int, str]) -> NoReturn:
    """Do PID 1's duty, until one of the processes that the host is there for has ended."""
    while True:
        pid, status = os.wait()
        if pid in essential:
            sys.exit(f"{essential[pid]} ended with code {os.waitstatus_to_exitcode(status)}")


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
