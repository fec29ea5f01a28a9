# SPDX-License-Identifier: Apache-2.0
"""Which process listens on a TCP port of this host: by the kernel's own tables, without asking anybody."""

from __future__ import annotations

import contextlib
import os
import socket

_LISTENING = "0A"


def listens_on(pid: int, port: int) -> bool:
    """Tell whether process ``pid`` itself listens on ``port``; False also for one whose sockets we may not see."""
    inodes = _listeners(pid, port)
    if not inodes:
        return False
    links = {f"socket:[{inode}]" for inode in inodes}
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # closed in the meantime
                    if os.readlink(entry.path) in links:
                        return True
    except OSError:
        return False
    return False


def is_here(host: str) -> bool:
    """Tell whether ``host``, a name or an address, is an address of this host: only then can a socket be bound to it."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _listeners(pid: int, port: int) -> set[str]:
    """Return the inodes of the sockets that listen on ``port`` in the network namespace of ``pid``."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
                rows = file.read().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            # sl, local address, remote address, state, …, inode
            fields = row.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes
