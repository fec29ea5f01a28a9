# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of one world on one node meet their node agent. Imported by every rank before the verdict."""

from __future__ import annotations

import _socket
import binascii
import os
import sys
from typing import TYPE_CHECKING

from dynamo_mpi.mpi.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo

_CREDENTIALS_BYTES = 12
_SHOWN = 40
_HYDRA_PROXY = "hydra_pmi_proxy"
_COMMAND_LENGTH = 15  # of /proc/PID/stat, see proc(5)
_MOST_PARENTS = 8


def agent_socket_name(launch: LaunchInfo, environ: Mapping[str, str]) -> str:
    """Return a name in Linux's abstract name space, which leaves no file behind; empty where there is none.

    It differs between users and between worlds, also between those of containers that share a network, so that several on a node don't
    meet: the address of PMIx's server is in it. A rank that is alone has no need of one.
    """
    if not sys.platform.startswith("linux") or launch.size == 1:
        return ""
    step = f"{launch.job_id}.{launch.step_id}" if launch.job_id and launch.step_id else ""
    # no variable of MPICH's tells one world from another; each has a proxy of its own on each node
    proxy = _proxy_of(os.getppid()) if launch.launcher is Launcher.HYDRA else ""
    world = environ.get("PMIX_NAMESPACE") or proxy or step
    if not world:
        # nothing that all ranks of a node have been told tells their world from another
        return ""
    servers = "".join(environ[name] for name in sorted(environ) if name.startswith("PMIX_SERVER_URI"))
    # a name has 107 bytes
    digest = binascii.crc32(f"{world} {servers}".encode())
    return f"\0dynamo_mpi {os.getuid()} {world[-_SHOWN:]} {digest:08x}"


def _proxy_of(pid: int) -> str:
    """Return a name for the Hydra proxy above a process, through shells and wrappers; empty where there is none to be seen."""
    for _ in range(_MOST_PARENTS):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                # the name may hold anything, parentheses too
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            return ""
        fields = rest.split()
        if name == _HYDRA_PROXY[:_COMMAND_LENGTH]:
            # with its start time: process ids come again
            return f"hydra {pid} {fields[19]}"
        pid = int(fields[1])
        if pid <= 1:
            return ""
    return ""


def peer_is_ours(connection: _socket.socket) -> bool:
    """Return whether a process of our own user is at the other end of a unix connection."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()
