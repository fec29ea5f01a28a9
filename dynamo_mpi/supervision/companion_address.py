# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of one world on one node meet their companion. Imported by every rank before the verdict."""

from __future__ import annotations

import _socket
import binascii
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.launchers.launch import Launch

_CREDENTIALS_BYTES = 12
_SHOWN = 40


def address_of(launch: Launch, environ: Mapping[str, str]) -> str:
    """Return a name in Linux's abstract name space, which leaves no file behind; empty where there is none.

    It differs between users and between worlds, also between those of containers that share a network, so that several on a node don't
    meet: the address of PMIx's server is in it. A rank that is alone has no need of one.
    """
    if not sys.platform.startswith("linux") or launch.size == 1:
        return ""
    step = f"{launch.job_id}.{launch.step_id}" if launch.job_id and launch.step_id else ""
    world = environ.get("PMIX_NAMESPACE") or step
    if not world:
        # nothing that all ranks of a node have been told tells their world from another
        return ""
    servers = "".join(environ[name] for name in sorted(environ) if name.startswith("PMIX_SERVER_URI"))
    # a name has 107 bytes
    digest = binascii.crc32(f"{world} {servers}".encode())
    return f"\0dynamo_mpi {os.getuid()} {world[-_SHOWN:]} {digest:08x}"


def peer_is_ours(connection: _socket.socket) -> bool:
    """Tell whether a process of our own user is at the other end of a unix connection."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()
