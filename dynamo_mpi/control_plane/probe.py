# SPDX-License-Identifier: Apache-2.0
"""Ask etcd and NATS whether they are there, before the Dynamo runtime does.

The runtime waits up to 120 s for either, holding Python's global lock all the while, so that not even a signal gets
through. A probe with a deadline costs milliseconds when all is well.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynamo_mpi.errors import DiscoveryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_ETCD = "http://localhost:2379"
DEFAULT_NATS = "nats://localhost:4222"


def etcd_endpoints(environ: Mapping[str, str]) -> list[str]:
    """Return the etcd endpoints that the Dynamo runtime will use, ``ETCD_ENDPOINTS`` or its default."""
    text = environ.get("ETCD_ENDPOINTS") or DEFAULT_ETCD
    return [part.strip() for part in text.split(",") if part.strip()]


def nats_server(environ: Mapping[str, str], request_plane: str) -> str | None:
    """Return the NATS server that the Dynamo runtime will connect to, or None where it won't.

    It connects whenever ``NATS_SERVER`` is set, whatever the request plane.
    """
    if given := environ.get("NATS_SERVER"):
        return given
    return DEFAULT_NATS if request_plane == "nats" else None


def probe_control_plane(environ: Mapping[str, str], request_plane: str, timeout: float) -> list[str]:
    """Make sure that etcd, and NATS where it is used, answer.

    Args:
        environ: where their addresses stand.
        request_plane: ``"tcp"`` or ``"nats"``.
        timeout: seconds that all of them together have.

    Returns:
        The etcd endpoints, those that answer first: the runtime gives up when the first of several is dead.

    Raises:
        DiscoveryError: no etcd endpoint answers, or NATS doesn't.
        UsageError: an address can't be read.
    """
    endpoints = etcd_endpoints(environ)
    server = nats_server(environ, request_plane)
    deadline = time.monotonic() + timeout
    with ThreadPoolExecutor(len(endpoints) + 1) as pool:
        etcd_answers = [pool.submit(_probe_etcd, url, deadline) for url in endpoints]
        nats_answer = pool.submit(_probe_nats, server, deadline) if server else None
        troubles = [answer.result() for answer in etcd_answers]
        nats_trouble = nats_answer.result() if nats_answer else None
    alive = [url for url, trouble in zip(endpoints, troubles, strict=True) if trouble is None]
    if not alive:
        listed = "; ".join(f"{_shown(url)}: {trouble}" for url, trouble in zip(endpoints, troubles, strict=True))
        raise DiscoveryError(
            f"etcd does not answer ({listed})",
            needed=f"an etcd that answers within {timeout:g} s",
            fix="start etcd on the head node, or set ETCD_ENDPOINTS=http://HOST:2379",
        )
    if server and nats_trouble:
        raise DiscoveryError(
            f"NATS does not answer ({_shown(server)}: {nats_trouble})",
            needed=f"a NATS server that answers within {timeout:g} s",
            fix="start nats-server on the head node and set NATS_SERVER=nats://HOST:4222, "
            "or leave NATS_SERVER unset and use the tcp request plane",
        )
    return alive + [url for url in endpoints if url not in alive]


def _probe_etcd(url: str, deadline: float) -> str | None:
    """Return what is wrong with one etcd endpoint, or None."""
    scheme, host, port = _address(url, 2379, ("http", "https"), "ETCD_ENDPOINTS")
    try:
        sock = socket.create_connection((host, port), timeout=_left(deadline))
    except OSError as error:
        return _reason(error)
    with sock:
        if scheme == "https":
            return _handshake(sock, host, deadline)
        # not HTTPConnection(timeout=...): that is per read, and a server may drip
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        try:
            sock.settimeout(_left(deadline))
            connection.request("GET", "/health")
            reply = connection.getresponse()
            body = json.loads(reply.read(4096))
        except (OSError, http.client.HTTPException) as error:
            return _reason(error)
        except ValueError:
            return "something else than etcd listens there"
    if not isinstance(body, dict) or "health" not in body:
        return "something else than etcd listens there"
    return (
        None if str(body["health"]).lower() == "true" else f"etcd says it is not healthy: {body.get('reason') or body}"
    )


def _handshake(sock: socket.socket, host: str, deadline: float) -> str | None:
    context = ssl.create_default_context()
    if authority := os.environ.get("ETCD_AUTH_CA"):
        context.load_verify_locations(cadata=authority)
    try:
        sock.settimeout(_left(deadline))
        with context.wrap_socket(sock, server_hostname=host):
            return None
    except (OSError, ssl.SSLError) as error:
        return _reason(error)


def _probe_nats(url: str, deadline: float) -> str | None:
    """Return what is wrong with the NATS server, or None. It speaks first, with one line: ``INFO {...}``."""
    _, host, port = _address(url, 4222, ("nats", "tls"), "NATS_SERVER")
    try:
        with socket.create_connection((host, port), timeout=_left(deadline)) as sock:
            sock.settimeout(_left(deadline))
            line = sock.recv(4096)
    except OSError as error:
        return _reason(error)
    return None if line.startswith(b"INFO ") else "something else than NATS listens there"


def _address(url: str, default_port: int, schemes: Sequence[str], variable: str) -> tuple[str, str, int]:
    parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
    try:
        port = parts.port or default_port
    except ValueError:
        port = 0
    if parts.scheme not in schemes or not parts.hostname or not port:
        raise UsageError(f"{variable}: {_shown(url)} can't be read", needed=f"{schemes[0]}://HOST:PORT")
    return parts.scheme, parts.hostname, port


def _shown(url: str) -> str:
    """Return the address without credentials that may stand in it."""
    return url.rpartition("@")[2] if "@" in url else url


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
