# SPDX-License-Identifier: Apache-2.0
"""What runs inside the namespaces: PID 1 above all hosts, and PID 1 of each host.

Started by ``hosts.Hosts``, never by people, with the verbs ``anchor STATE`` and ``host STATE NAME``. The anchor's PID 1 builds the networks,
starts the hosts, says ``ready`` on stdout, and then runs commands on hosts for the agent: it is the only process that may enter all of
them, as no host's PID namespace holds another's.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from tests.namespaces.anchor import NAMESPACES, READY
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
from tests.namespaces.processes import children_of, command_line

from .settings import HostsSettings

START_SECONDS = 20.0
OLD_TMP = Path("/mnt")
"""Where a host sees the machine's /tmp while it builds its own."""
LOGIN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}
"""All that a command has that comes by way of the agent: ssh hands no variables on, either."""


def inside_command(verb: str, state: Path, *arguments: str) -> list[str]:
    """Return the argv that runs this module; ``-S`` as it needs nothing but the standard library, and starts sooner."""
    return [sys.executable, "-S", "-m", __spec__.name if __spec__ else __name__, verb, str(state), *arguments]


def build_networks(settings: HostsSettings) -> None:
    """A bridge for each network, and per host a named network namespace with a cable to each."""
    keep_names_apart()
    for number in range(len(settings.networks)):
        add_bridge(f"br{number}")
    for name in settings.names:
        command("ip", "netns", "add", name)
        for number in range(len(settings.networks)):
            cable, interface = settings.cable(name, number), f"eth{number}"
            add_cable(f"br{number}", cable, name, interface, f"{settings.address(name, number)}/24")
        if settings.second_rate:
            shape = ("root", "tbf", "rate", settings.second_rate, "burst", "64k", "latency", "400ms")
            command("tc", "qdisc", "add", "dev", settings.cable(name, 1), *shape)
            command("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth1", *shape)


def anchor(settings: HostsSettings) -> NoReturn:
    """PID 1 above all hosts."""
    build_networks(settings)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(settings.socket))
    listener.listen()
    started = [
        subprocess.Popen(host_command(name, inside_command("host", settings.state, name))) for name in settings.names
    ]
    for name in settings.names:
        wait_until_ready(settings, name)
    print(READY, flush=True)
    os.close(1)
    # no process waits for those that serve, nor for what hosts leave
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    del started
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            serve(settings, connection)
            os._exit(0)
        connection.close()


def wait_until_ready(settings: HostsSettings, name: str) -> None:
    """Wait until a host has become one.

    Raises:
        ClusterError: it does not in time.
    """
    end = time.monotonic() + START_SECONDS
    while not (settings.state / f"{name}.ready").exists():
        if time.monotonic() > end:
            raise ClusterError(f"{name} does not start")
        time.sleep(0.01)


def host(settings: HostsSettings, name: str) -> NoReturn:
    """PID 1 of a host."""
    become_host(name, settings.hosts)
    command("mount", "--bind", settings.resolv_conf, "/etc/resolv.conf")
    own_tmp([settings.state, *settings.visible])
    (settings.state / f"{name}.ready").touch()
    # reaps, and never ends by itself
    while True:
        try:
            reap_until_end_of({})
        except ChildProcessError:
            time.sleep(0.05)


def own_tmp(visible: list[Path]) -> None:
    """Put a /tmp of its own in the place of the machine's, but for some folders."""
    tmp = Path("/tmp")
    command("mount", "--rbind", tmp, OLD_TMP)
    command("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", tmp)
    for folder in visible:
        folder.mkdir(parents=True, exist_ok=True)
        command("mount", "--rbind", OLD_TMP / folder.relative_to(tmp), folder)
    command("umount", "--lazy", OLD_TMP)


def serve(settings: HostsSettings, connection: socket.socket) -> None:
    """Run one command on a host, with the caller's stdin, stdout and stderr, and answer with its exit code."""
    size = 1 << 20
    data, ancillary, _, _ = connection.recvmsg(size, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content)
    while not data.endswith(b"\n"):
        data += connection.recv(size)
    request = json.loads(data)
    argv = inside_command("host", settings.state, request["host"])
    holders = [holder for holder in children_of(1) if command_line(holder)[-len(argv) :] == argv]
    init = children_of(holders[0])[0] if holders else 0
    enter = ["nsenter", f"--target={init}", *NAMESPACES, "env", "--chdir=/root", "--"]
    stdin, stdout, stderr = descriptors
    done = subprocess.run(
        [*enter, "/bin/sh", "-c", request["line"]], stdin=stdin, stdout=stdout, stderr=stderr, env=LOGIN_ENVIRONMENT
    )
    try:
        connection.sendall(json.dumps({"code": done.returncode % 256}).encode() + b"\n")
    except OSError:
        return  # the agent was ended; what it asked for went on, as behind an ssh that is ended


def main(verb: str, state: str, *names: str) -> None:
    settings = HostsSettings.load(Path(state))
    try:
        if verb == "anchor":
            anchor(settings)
        elif verb == "host":
            host(settings, *names)
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
