# SPDX-License-Identifier: Apache-2.0
"""The socket through which the ranks of one node reach their node agent. Every rank imports it before the preflight result."""

from __future__ import annotations

import _socket
import binascii
import contextlib
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.mpi.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo

_CREDENTIALS_BYTES = 12
_MAX_WORLD_CHARS = 40
_HYDRA_PROXY = "hydra_pmi_proxy"
_COMMAND_LENGTH = 15  # of /proc/PID/stat, see proc(5)
_MAX_PARENTS = 8


class Agent(NamedTuple):
    """A node agent that this rank has started.

    Args:
        connection: connection to the agent.
        pid: the agent's process, a child of this one.
    """

    connection: _socket.socket
    pid: int


def agent_socket_name(launch: LaunchInfo, environ: Mapping[str, str]) -> str:
    """Return a name in Linux's abstract socket name space, which needs no file; empty if there is no usable name.

    The name differs between users and between worlds, even in containers that share a network, so that several worlds on a node stay
    apart: it includes the address of the PMIx server. A world of one rank needs no name.
    """
    if not sys.platform.startswith("linux") or launch.size == 1:
        return ""
    step = f"{launch.job_id}.{launch.step_id}" if launch.job_id and launch.step_id else ""
    # no MPICH variable identifies a world, but each world has a proxy of its own on each node
    proxy = _proxy_of(os.getppid()) if launch.launcher is Launcher.HYDRA else ""
    world = environ.get("PMIX_NAMESPACE") or proxy or step
    if not world:
        # no variable that all ranks of a node share identifies their world
        return ""
    servers = "".join(environ[name] for name in sorted(environ) if name.startswith("PMIX_SERVER_URI"))
    # a socket name has at most 107 bytes
    digest = binascii.crc32(f"{world} {servers}".encode())
    return f"\0dynamo_mpi {os.getuid()} {world[-_MAX_WORLD_CHARS:]} {digest:08x}"


def _proxy_of(pid: int) -> str:
    """Return an identifier of the Hydra proxy that is an ancestor of a process; empty if none is visible."""
    for _ in range(_MAX_PARENTS):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                # the name may contain any character, even parentheses
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            return ""
        fields = rest.split()
        if name == _HYDRA_PROXY[:_COMMAND_LENGTH]:
            # with its start time, as process ids are reused
            return f"hydra {pid} {fields[19]}"
        pid = int(fields[1])
        if pid <= 1:
            return ""
    return ""


def peer_is_ours(connection: _socket.socket) -> bool:
    """Return whether the peer of a unix connection runs as the same user."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()


def warn(text: str, host: str = "") -> None:
    """Log a warning about this node. Does not raise."""
    with contextlib.suppress(Exception):  # for instance, the file system is gone
        from dynamo_mpi.common.log_record import Level
        from dynamo_mpi.common.log_writer import log_writer

        log_writer.emit(None, host or os.uname().nodename.partition(".")[0], f"warning: {text}", Level.WARN)
