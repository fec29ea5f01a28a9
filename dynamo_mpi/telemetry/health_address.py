# SPDX-License-Identifier: Apache-2.0
"""Where a node's agent answers health requests: the address, from Dynamo's own variables, the listening socket, and the runtime's own port.

The Dynamo runtime has a server of its own on rank 0's node; what the agent doesn't answer is forwarded to it. The runtime writes its port
into the model card, and frontends fetch the tokenizer's files from it, so it must not listen on loopback only.

Imported before MPI runs, if ``DYN_SYSTEM_PORT`` is set.
"""

from __future__ import annotations

import os
import socket

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.mpi.launcher import LaunchInfo


PORT_VARIABLE, HOST_VARIABLE = "DYN_SYSTEM_PORT", "DYN_SYSTEM_HOST"
_HEALTH_VARIABLE, _LIVE_VARIABLE = "DYN_SYSTEM_HEALTH_PATH", "DYN_SYSTEM_LIVE_PATH"
_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - what a user may choose, and Dynamo's default
_MOST_PORT = 65535
_BACKLOG = 128


class HealthAddress(NamedTuple):
    """Address and paths of the health server.

    Args:
        host: the host to listen at.
        port: the port; 0 for any.
        health_path: path of the readiness answer.
        live_path: path of the liveness answer.
    """

    host: str
    port: int
    health_path: str = "/health"
    live_path: str = "/live"

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens at all interfaces."""
        return self.host in _EVERYWHERE

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> HealthAddress | None:
        """Read the address; None if it is off, as by default or with a negative port.

        Raises:
            UsageError: the port is invalid.
        """
        text = environ.get(PORT_VARIABLE, "").strip()
        if not text:
            return None
        try:
            port = int(text)
        except ValueError:
            port = _MOST_PORT + 1
        if port > _MOST_PORT:
            raise UsageError(
                f"{PORT_VARIABLE} is {text!r}",
                expected=f"a TCP port, at most {_MOST_PORT}; 0 for any that is free; unset or negative for none",
                fix=f"correct {PORT_VARIABLE}",
            )
        if port < 0:
            return None
        return cls(
            environ.get(HOST_VARIABLE, "").strip() or "0.0.0.0",  # noqa: S104 - Dynamo's default
            port,
            environ.get(_HEALTH_VARIABLE) or "/health",
            environ.get(_LIVE_VARIABLE) or "/live",
        )


class HealthEndpoint(NamedTuple):
    """The address with the actual port, and the socket that listens there."""

    address: HealthAddress
    listener: socket.socket


def open_health_endpoint(
    launch: LaunchInfo, log: RankLogger, environ: Mapping[str, str]
) -> HealthEndpoint | UsageError | None:
    """Listen for health requests, on the first rank of a node.

    Args:
        launch: how this rank was started.
        log: logs a warning if a node other than rank 0's can't listen.
        environ: has the address.

    Returns:
        The endpoint; None if there is none; an error if rank 0's node can't listen.
    """
    try:
        address = HealthAddress.of(environ)
        if address is None:
            return None
        listener = _listen(address)
    except UsageError as error:
        if launch.rank == 0:
            return error
        log.warning(f"this node has no health server: {error}")
        return None
    return HealthEndpoint(address._replace(port=listener.getsockname()[1]), listener)


def _listen(address: HealthAddress) -> socket.socket:
    host = address.host.strip("[]")
    try:
        if host == "::" and socket.has_dualstack_ipv6():
            return socket.create_server(
                (host, address.port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        family, *_, place = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        from dynamo_mpi.common.ports import holder

        who = holder(address.port) if address.port else None
        why = f"{who} listens there" if who else error.strerror or str(error)
        raise UsageError(
            f"{PORT_VARIABLE}={address.port}: /health, /live and /metrics can't be served at {address.host}:{address.port}: {why}",
            expected=f"a free port on every node, and an address of each in {HOST_VARIABLE}",
            fix=f"free it, or choose another {PORT_VARIABLE}; of two workers on a node, each needs its own",
        ) from None


# The runtime reads it as a signed 16-bit number. The system assigns dynamic ports from 32768 on, so a port below stays free until the
# runtime uses it, which may be minutes later.
_LEAST, _MOST = 20000, 32767
_TRIES = 200


def runtime_port(address: HealthAddress, choice: int | None) -> int:
    """Return a port for the runtime.

    Args:
        address: the health server's address.
        choice: the user's choice, if any.

    Raises:
        UsageError: the chosen port is in use, or none is free.
    """
    # not before MPI runs: the first rank of a node imports this module there
    from dynamo_mpi.common.ports import holder, is_free

    host = address.host.strip("[]")
    if choice is not None:
        if not is_free(choice, host):
            raise UsageError(
                f"the Dynamo runtime can't listen at its port {choice}: {holder(choice) or 'another program'} listens there",
                expected="a free port beside DYN_SYSTEM_PORT, from which frontends fetch the model's tokenizer",
                fix="free it, or choose another --runtime-system-port (DYN_MPI_RUNTIME_SYSTEM_PORT), or none",
            )
        return choice
    for _ in range(_TRIES):
        port = _LEAST + int.from_bytes(os.urandom(4), "big") % (_MOST - _LEAST + 1)
        if is_free(port, host):
            return port
    raise UsageError(
        f"no port between {_LEAST} and {_MOST} is free for the Dynamo runtime",
        expected="one beside DYN_SYSTEM_PORT",
        fix="name one by --runtime-system-port (DYN_MPI_RUNTIME_SYSTEM_PORT)",
    )


def url_of(address: HealthAddress) -> str:
    """Return the health server's URL for other hosts."""
    from dynamo_mpi.common.host_address import host_address
    from dynamo_mpi.common.ports import in_url

    host = address.host.strip("[]")
    if address.is_everywhere:
        host = host_address(None, "")
    return f"http://{in_url(host)}:{address.port}"
