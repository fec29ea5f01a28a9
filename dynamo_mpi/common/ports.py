# SPDX-License-Identifier: Apache-2.0
"""TCP ports: find a free one, and check whether a process holds it.

A port found by binding to 0 may be taken by another process before the service binds it, and that process may even answer the service's
health check. So a service counts as ready only if *its* process owns the listening socket.
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - what a user may choose
_PORT_ATTEMPTS, _LOOPBACK_SECONDS = 5, 5.0
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def in_url(host: str) -> str:
    """Return an address in URL form: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free, at least at the moment of the call."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def require_loopback() -> None:
    """Check that programs of this host can reach each other at `LOOPBACK`.

    Raises:
        UsageError: they can't.
    """
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), _LOOPBACK_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"nothing can be reached at {LOOPBACK}: {error.strerror or error}",
            expected=f"the interface {LOOPBACK_INTERFACE}, up and with this address",
            fix=f"ip link set {LOOPBACK_INTERFACE} up (a new network namespace, as of unshare --net, has it down); "
            f"ip address add {LOOPBACK}/8 dev {LOOPBACK_INTERFACE}; or look at the firewall",
        ) from None


def loopback_ports(fixed: int | None = None) -> Callable[[], int | None]:
    """Return a function that returns loopback ports to try, one per call: only ``fixed``, or a few free ones; then None."""
    ports = iter([fixed]) if fixed is not None else (free_port() for _ in range(_PORT_ATTEMPTS))
    return lambda: next(ports, None)


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Return whether a server could listen on a TCP port of an address of this host now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like servers, which ignore TIME_WAIT
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError:
            return False
        return True


class Listener(NamedTuple):
    """A listening socket, as the kernel lists it."""

    inode: str
    user: int


def listeners(table: str, port: int) -> list[Listener]:
    """Return the sockets that listen on a port, from the text of ``/proc/net/tcp`` or ``tcp6``.

    Columns (proc(5)): sl, local_address as HEX:HEX, rem_address, st, three more, uid, timeout, inode.
    """
    found = []
    for line in table.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 9 and columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
            found.append(Listener(columns[9], int(columns[7])))
    return found


def listening_at(pid: int) -> list[tuple[str, int]]:
    """Return the addresses and ports at which a process itself listens, over TCP, sorted; empty if it can't be looked at."""
    found = []
    try:
        sockets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            # its own table, as it may be in another network namespace
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and f"socket:[{columns[9]}]" in sockets:
                    address, _, port = columns[1].partition(":")
                    # words of 32 bits in the host's order
                    words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                    packed = struct.pack(f"={len(words)}I", *words)
                    found.append((socket.inet_ntop(family, packed), int(port, 16)))
    except (OSError, IndexError, ValueError):
        return sorted(found)
    return sorted(found)


def holds_port(pid: int, port: int) -> bool:
    """Return whether process ``pid`` itself listens on TCP ``port``, over IPv4 or IPv6."""
    return _owns(pid, {f"socket:[{listener.inode}]" for listener in _listeners_seen_by(str(pid), port)})


def holder(port: int) -> str | None:
    """Describe the process that listens on a TCP port of this host; None if it can't be found.

    Without root rights, only the user of another user's process is visible.
    """
    found = _listeners_seen_by("self", port)
    if not found:
        return None
    wanted = {f"socket:[{listener.inode}]" for listener in found}
    for process in Path("/proc").glob("[0-9]*"):
        if _owns(int(process.name), wanted):
            try:
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
            except OSError:
                break  # exited meanwhile
    try:
        return f"a process of user {pwd.getpwuid(found[0].user).pw_name}"
    except KeyError:
        return f"a process of user {found[0].user}"


def _listeners_seen_by(process: str, port: int) -> list[Listener]:
    """Read the process's own tables, as it may be in another network namespace."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            found += listeners((Path("/proc") / process / "net" / table).read_text(), port)
        except OSError:
            continue  # the process has exited, or the kernel has no IPv6
    return found


def _owns(pid: int, sockets: set[str]) -> bool:
    try:
        descriptors = list((Path("/proc") / str(pid) / "fd").iterdir()) if sockets else []
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor) in sockets:
                return True
        except OSError:
            continue  # closed meanwhile
    return False
