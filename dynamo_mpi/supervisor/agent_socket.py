# SPDX-License-Identifier: Apache-2.0
"""How ranks reach their node's agent, and the agents of several nodes each other. Every rank imports it before the preflight result."""

from __future__ import annotations

import _socket
import binascii
import contextlib
import os
import stat
import sys

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple, Protocol
from dynamo_mpi.mpi.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.mpi.world import World


_CREDENTIALS_BYTES = 12
_MAX_WORLD_CHARS = 40
_HYDRA_PROXY = "hydra_pmi_proxy"
_COMMAND_LENGTH = 15  # of /proc/PID/stat, see proc(5)
_MAX_PARENTS = 8
_NAMES = 4
_MAX_PATH_BYTES = 107
_PAGE_BYTES = 4096


class AgentConnection(Protocol):
    """A rank's connection to its node agent, as `connect_agents` needs it: see `NodeAgentClient`."""

    agent_token: str

    @property
    def connected(self) -> bool:
        """Whether an agent is connected."""

    def send(self, line: str) -> None:
        """Send the agent a line."""

    def give_listener(self, descriptor: int) -> None:
        """Pass the agent the socket on which it accepts the agents of other nodes."""


class Agent(NamedTuple):
    """A node agent that this rank has started.

    Args:
        connection: connection to the agent.
        pid: the agent's process, a child of this one.
    """

    connection: _socket.socket
    pid: int


def agent_addresses(launch: LaunchInfo, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the addresses at which the node's agent may listen: it takes the first that it can have, and ranks try all.

    The first is a file in the launcher's private folder, if there is one: no other user can be there first. The others are names in
    Linux's abstract name space, which need no file; another user can occupy them if it can compute them, so there are several. All differ
    between users and between worlds, even in containers that share a network, as they include the address of the PMIx server. Empty for a
    world of one rank, and if no variable that all ranks of a node share identifies their world.
    """
    if not sys.platform.startswith("linux") or launch.size == 1:
        return ()
    step = f"{launch.job_id}.{launch.step_id}" if launch.job_id and launch.step_id else ""
    # no MPICH variable identifies a world, but each world has a proxy of its own on each node
    proxy, secret = _proxy_of(os.getppid()) if launch.launcher is Launcher.HYDRA else ("", b"")
    world = environ.get("PMIX_NAMESPACE") or proxy or step
    if not world:
        return ()
    servers = "".join(environ[name] for name in sorted(environ) if name.startswith("PMIX_SERVER_URI"))
    digest = binascii.crc32(f"{world} {servers}".encode() + secret)
    # a socket name has at most 107 bytes
    name = f"\0dynamo_mpi {os.getuid()} {world[-_MAX_WORLD_CHARS:]} {digest:08x}"
    names = tuple(f"{name} {number}" for number in range(_NAMES))
    folder = environ.get("PMIX_SERVER_TMPDIR", "")
    return (f"{folder.rstrip('/')}/dynamo_mpi.{digest:08x}", *names) if _is_private(folder) else names


def _is_private(folder: str) -> bool:
    """Return whether this is a folder of ours in which no other user can create files."""
    try:
        status = os.stat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def connect_to_agent(addresses: tuple[str, ...]) -> _socket.socket | None:
    """Return a connection to the agent at one of these addresses; None if none of them has one yet. Doesn't wait."""
    for address in addresses:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            # if another user listens there and accepts nothing, a blocking connect would wait without limit
            connection.setblocking(False)
            with _short(address) as name:
                connection.connect(name)
            if peer_is_ours(connection):
                connection.setblocking(True)
                return connection
        except OSError:
            pass
        connection.close()
    return None


def listen_for_ranks(addresses: tuple[str, ...], backlog: int) -> _socket.socket:
    """Listen at the first of these addresses that can be had.

    Raises:
        OSError: none can be had.
    """
    problem = OSError("no address")
    for address in addresses:
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            with _short(address) as name:
                if not address.startswith("\0"):
                    with contextlib.suppress(
                        FileNotFoundError
                    ):  # else it was left by a predecessor: the folder is private
                        os.unlink(name)
                listener.bind(name)
            listener.listen(backlog)
            return listener
        except OSError as error:
            listener.close()
            problem = error
    raise problem


def remove_address(addresses: tuple[str, ...]) -> None:
    """Remove the file of the agent's socket, if it has one. Does not raise."""
    for address in addresses:
        if not address.startswith("\0"):
            with contextlib.suppress(OSError):
                os.unlink(address)


@contextlib.contextmanager
def _short(address: str) -> Iterator[str]:
    """Provide an address for a socket, whose path may have 107 bytes only."""
    if address.startswith("\0") or len(os.fsencode(address)) <= _MAX_PATH_BYTES:
        yield address
        return
    folder, _, name = address.rpartition("/")
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _proxy_of(pid: int) -> tuple[str, bytes]:
    """Return an identifier of the Hydra proxy that is an ancestor of a process, and bytes that only its user can read; empty if none is
    visible."""
    for _ in range(_MAX_PARENTS):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                # the name may contain any character, even parentheses
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            return "", b""
        fields = rest.split()
        if name == _HYDRA_PROXY[:_COMMAND_LENGTH]:
            # with its start time, as process ids are reused
            return f"hydra {pid} {fields[19]}", _random_addresses(pid)
        pid = int(fields[1])
        if pid <= 1:
            return "", b""
    return "", b""


def _random_addresses(pid: int) -> bytes:
    """Return where the kernel has put a process in its address space, by chance; another user can't read it (proc(5), auxv)."""
    try:
        with open(f"/proc/{pid}/auxv", "rb") as file:
            return file.read(_PAGE_BYTES)
    except OSError:
        return b""


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


_MAX_ADDRESSES = 8
_TOKEN_BYTES = 32
# tried last: pods of one host may share it
LOOPBACK = "127.0.0.1"
_BARRIER_SECONDS = 5.0


def connect_agents(world: World, local_rank: int | None, client: AgentConnection, host: str) -> None:
    """Let the agents of all nodes connect to rank 0's agent. Collective.

    Args:
        world: all ranks.
        local_rank: this rank's number among the ranks of its node.
        client: this rank's connection to its node agent.
        host: this node.
    """
    text = world.broadcast(_listen_for_agents(client, host).encode() if world.rank == 0 else b"").decode()
    # one rank of each node, rank 0's node included
    if text and local_rank == 0:
        client.send(f"agents {text}")
    # after this barrier each agent knows where rank 0's agent listens, so a rank's exit is reported to it
    world.barrier(_BARRIER_SECONDS)


def _listen_for_agents(client: AgentConnection, host: str) -> str:
    """Listen for the agents of other nodes at all addresses of this host: which of them others can reach isn't known before preflight.

    Returns:
        Addresses, port and token, as one line; empty if there is no agent or no address to listen at.
    """
    import json
    import socket

    from dynamo_mpi.common.interfaces import host_networks
    from dynamo_mpi.common.networks import usable

    if not client.connected:
        return ""
    try:
        by_speed = sorted(usable(host_networks(host)), key=lambda found: -found[0].speed)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=128, dualstack_ipv6=both) as listener:
            client.give_listener(listener.fileno())
            port = listener.getsockname()[1]
    except OSError:  # then they connect after the preflight result
        return ""
    addresses = [str(address.ip) for _, address in by_speed[:_MAX_ADDRESSES]]
    client.agent_token = os.urandom(_TOKEN_BYTES).hex()
    return json.dumps({"host": host, "addresses": [*addresses, LOOPBACK], "port": port, "token": client.agent_token})
