# SPDX-License-Identifier: Apache-2.0
"""Ask etcd and NATS whether they are there, before the Dynamo runtime does.

The runtime waits up to 120 s for either, holding Python's global lock all the while, so that not even a signal gets
through. A probe with a deadline costs milliseconds when all is well.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.errors import AuthorisationError, DiscoveryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DEFAULT_ETCD = "http://localhost:2379"
DEFAULT_NATS = "nats://localhost:4222"

_LATE = "no answer in time"
_MOST_BYTES = 65536


class _Address(NamedTuple):
    scheme: str
    host: str
    port: int


class _Trouble(NamedTuple):
    text: str
    refused: bool = False

    def __str__(self) -> str:
        return self.text


def etcd_endpoints(environ: Mapping[str, str]) -> list[str]:
    """Return the etcd endpoints that the Dynamo runtime is to use: ``ETCD_ENDPOINTS``, or etcd's port on the head node that Dynamo's Slurm
    example names, or the runtime's default."""
    head = environ.get("HEAD_NODE_IP") or environ.get("HEAD_NODE")
    at_head = "" if not head else f"http://[{head}]:2379" if ":" in head else f"http://{head}:2379"
    text = environ.get("ETCD_ENDPOINTS") or at_head or DEFAULT_ETCD
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
        AuthorisationError: etcd does not take this client's certificate, or wants one.
        UsageError: an address, or a certificate in ``ETCD_AUTH_*``, can't be read.
    """
    server = nats_server(environ, request_plane)
    deadline = time.monotonic() + timeout
    etcd = _Etcd.of(environ)
    questions = etcd.questions(deadline)
    if server:
        questions.append(_nats_question(server, deadline))
    troubles = _ask_together(questions, deadline)
    nats_trouble = troubles.pop() if server else None
    alive = etcd.alive(troubles, timeout)
    if server and nats_trouble:
        raise _nats_error(server, nats_trouble, timeout)
    return alive + [url for url in etcd.endpoints if url not in alive]


def probe_nats(server: str, timeout: float) -> None:
    """Make sure that NATS answers.

    Raises:
        DiscoveryError: it doesn't.
        UsageError: its address can't be read.
    """
    deadline = time.monotonic() + timeout
    if trouble := _ask_together([_nats_question(server, deadline)], deadline)[0]:
        raise _nats_error(server, trouble, timeout)


def _nats_question(server: str, deadline: float) -> Callable[[], str | None]:
    return partial(_probe_nats, _address(server, 4222, ("nats", "tls"), "NATS_SERVER"), deadline)


def _nats_error(server: str, trouble: _Trouble, timeout: float) -> DiscoveryError:
    return DiscoveryError(
        f"NATS does not answer ({shown(server)}: {trouble})",
        needed=f"a NATS server that answers within {timeout:g} s",
        fix="start nats-server on the head node and set NATS_SERVER=nats://HOST:4222, "
        "or leave NATS_SERVER unset and use the tcp request plane",
    )


def probe_etcd(environ: Mapping[str, str], timeout: float) -> dict[str, str]:
    """Ask etcd alone, and tell how each endpoint is.

    Returns:
        By endpoint what is wrong with it; empty where it answers.

    Raises:
        DiscoveryError: no endpoint answers.
        AuthorisationError: etcd does not take this client's certificate, or wants one.
        UsageError: an address, or a certificate in ``ETCD_AUTH_*``, can't be read.
    """
    deadline = time.monotonic() + timeout
    etcd = _Etcd.of(environ)
    troubles = _ask_together(etcd.questions(deadline), deadline)
    etcd.alive(troubles, timeout)
    return {url: "" if trouble is None else trouble.text for url, trouble in zip(etcd.endpoints, troubles, strict=True)}


class _Etcd(NamedTuple):
    """etcd's endpoints, and who we are to it."""

    endpoints: list[str]
    addresses: list[_Address]
    auth: EtcdAuth
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> _Etcd:
        endpoints = etcd_endpoints(environ)
        addresses = [_address(url, 2379, ("http", "https"), "ETCD_ENDPOINTS") for url in endpoints]
        if not endpoints:
            raise UsageError(
                "ETCD_ENDPOINTS names no endpoint", needed="http://HOST:PORT, or several with commas between"
            )
        auth = EtcdAuth.of(environ)
        return cls(
            endpoints, addresses, auth, auth.tls() if any(address.scheme == "https" for address in addresses) else None
        )

    def questions(self, deadline: float) -> list[Callable[[], str | None]]:
        return [partial(_probe_etcd, address, self.tls, deadline) for address in self.addresses]

    def alive(self, troubles: Sequence[_Trouble | None], timeout: float) -> list[str]:
        """Return the endpoints that answer; raises where none does."""
        alive = [url for url, trouble in zip(self.endpoints, troubles, strict=True) if trouble is None]
        if alive:
            return alive
        listed = "; ".join(f"{shown(url)}: {trouble}" for url, trouble in zip(self.endpoints, troubles, strict=True))
        if any(trouble is not None and trouble.refused for trouble in troubles):
            raise _refusal(listed, self.auth)
        raise DiscoveryError(
            f"etcd does not answer ({listed})",
            needed=f"an etcd that answers within {timeout:g} s",
            fix="start etcd on the head node, or set ETCD_ENDPOINTS=http://HOST:2379",
        )


def _refusal(listed: str, auth: EtcdAuth) -> AuthorisationError:
    if auth.certificate:
        return AuthorisationError(
            f"etcd refuses this worker's certificate ({listed})",
            needed="a certificate of the authority that etcd trusts (its --trusted-ca-file), for clients, and not expired",
            fix="correct ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY; openssl x509 -noout -text shows what it is",
        )
    return AuthorisationError(
        f"etcd refuses a worker without a certificate ({listed})",
        needed="a client certificate",
        fix="set ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY to PEM texts",
    )


def _ask_together(questions: Sequence[Callable[[], str | None]], deadline: float) -> list[_Trouble | None]:
    """Ask all at once. A thread that doesn't end in time is left behind: a name look-up knows no timeout."""
    answers: list[_Trouble | None] = [_Trouble(_LATE)] * len(questions)

    def ask(index: int) -> None:
        try:
            text = questions[index]()
            answers[index] = _Trouble(text) if text else None
        except OSError as error:
            answers[index] = _Trouble(_reason(error), refused=_is_refusal(error))

    threads = [
        threading.Thread(target=ask, args=(index,), name="probe", daemon=True) for index in range(len(questions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


def _probe_etcd(address: _Address, tls: ssl.SSLContext | None, deadline: float) -> str | None:
    """Return what is wrong with one etcd endpoint, or None."""
    with socket.create_connection((address.host, address.port), timeout=_left(deadline)) as sock:
        sock.settimeout(_left(deadline))
        if address.scheme == "https" and tls is not None:
            with tls.wrap_socket(sock, server_hostname=address.host) as secured:
                reply = _get_health(secured, address, deadline)
        else:
            reply = _get_health(sock, address, deadline)
    if not reply:
        return "it hung up without an answer"
    try:
        body = json.loads(reply.partition(b"\r\n\r\n")[2])
    except (ValueError, RecursionError):
        body = None
    if not reply.startswith(b"HTTP/") or not isinstance(body, dict) or "health" not in body:
        return "something else than etcd listens there"
    healthy = str(body["health"]).lower() == "true"
    return None if healthy else f"etcd says it is not healthy: {body.get('reason') or body}"


def _get_health(sock: socket.socket, address: _Address, deadline: float) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    # HTTP/1.0: the reply ends with the connection, and never comes in chunks
    question = f"GET /health HTTP/1.0\r\nHost: {host}:{address.port}\r\n\r\n".encode()
    # one that refuses our certificate has hung up by now, and what it said of that is still to be read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(question)
    return _receive(sock, deadline)


def _probe_nats(address: _Address, deadline: float) -> str | None:
    """Return what is wrong with the NATS server, or None. It speaks first, with one line: ``INFO {...}``."""
    with socket.create_connection((address.host, address.port), timeout=_left(deadline)) as sock:
        line = _receive(sock, deadline, enough=len(b"INFO "))
    return None if line.startswith(b"INFO ") else "something else than NATS listens there"


def _receive(sock: socket.socket, deadline: float, enough: int = _MOST_BYTES) -> bytes:
    """Read until the other side closes, or ``enough`` bytes have come. A socket's own timeout begins anew with every byte."""
    data = b""
    while len(data) < enough:
        sock.settimeout(_left(deadline))
        part = sock.recv(4096)
        if not part:
            break
        data += part
    return data


def _address(url: str, default_port: int, schemes: Sequence[str], variable: str) -> _Address:
    try:
        parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
        host, port = parts.hostname or "", parts.port or default_port
        # as the name look-up will; it can't for labels that are empty or too long
        host.encode("idna")
        readable = parts.scheme in schemes and host != ""
    except ValueError:
        readable = False
    if not readable:
        raise UsageError(f"{variable}: {shown(url)} can't be read", needed=f"{schemes[0]}://HOST:PORT")
    return _Address(parts.scheme, host, port)


def shown(url: str) -> str:
    """Return the address without credentials that may stand in it."""
    return url.rpartition("@")[2] if "@" in url else url


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_refusal(error: OSError) -> bool:
    """Did the other side find fault with our certificate? Since TLS 1.3 it says so only in the place of its first answer."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "_ALERT_" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED"))


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return _LATE
    return error.strerror.lower() if error.strerror else str(error) or type(error).__name__
