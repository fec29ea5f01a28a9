# SPDX-License-Identifier: Apache-2.0
"""Loopback ports: find a free one, and tell whether a process really holds it.

A port found by binding to 0 may be taken by somebody else before the service binds it, and that somebody may even
answer the service's probe. So a service counts as ready only when *its* process owns the listening socket.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Tell whether a server could listen on a TCP port of the loopback interface now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no hindrance
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except OSError:
            return False
        return True


def listening_inodes(table: str, port: int) -> frozenset[str]:
    """Return the socket inodes that listen on a port, from the text of ``/proc/net/tcp``.

    Columns (proc(5)): sl, local_address as HEX:HEX, rem_address, st, four more, uid, timeout, inode.
    """
    inodes = set()
    for line in table.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 9 and columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
            inodes.add(columns[9])
    return frozenset(inodes)


def holds_port(pid: int, port: int) -> bool:
    """Tell whether process ``pid`` itself listens on TCP ``port`` (IPv4)."""
    process = Path("/proc") / str(pid)
    try:
        wanted = {f"socket:[{inode}]" for inode in listening_inodes((process / "net" / "tcp").read_text(), port)}
        descriptors = list((process / "fd").iterdir()) if wanted else []
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor) in wanted:
                return True
        except OSError:
            continue  # closed meanwhile
    return False
