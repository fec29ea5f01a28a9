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

from dynamo_mpi.control_plane.asking import (
    LATE,
    Address,
    Trouble,
    is_refusal,
    left,
    read_address,
    reason_of,
    receive,
    shown,
)
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.nats_auth import NatsAuth
from dynamo_mpi.control_plane.nats_probe import nats_absence, nats_refusal, probe_nats
from dynamo_mpi.control_plane.runtime_limits import require_nats, runtime_version
from dynamo_mpi.errors import AuthorisationError, BootstrapError, DiscoveryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DEFAULT_ETCD = "http://localhost:2379"
DEFAULT_NATS = "nats://localhost:4222"


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
        AuthorisationError: etcd does not take this client's certificate, or wants one; or NATS does not take its credentials.
        UsageError: an address, or what ``ETCD_AUTH_*``, ``NATS_AUTH_*`` or ``NATS_TLS_*`` say, can't be used.
    """
    server = nats_server(environ, request_plane)
    deadline = time.monotonic() + timeout
    etcd = _Etcd.of(environ)
    questions = etcd.questions(deadline)
    if server:
        questions.append(_nats_question(server, environ, deadline))
    troubles = _ask_together(questions, deadline)
    nats_trouble = troubles.pop() if server else None
    alive = etcd.alive(troubles, timeout)
    if server and nats_trouble:
        raise _nats_error(server, environ, nats_trouble, timeout)
    return alive + [url for url in etcd.endpoints if url not in alive]


def require_nats_server(server: str, environ: Mapping[str, str], timeout: float) -> None:
    """Make sure that NATS answers, and takes our credentials.

    Raises:
        DiscoveryError: it doesn't answer.
        AuthorisationError: it doesn't take them.
        UsageError: its address, or what ``NATS_AUTH_*`` or ``NATS_TLS_*`` say, can't be used.
    """
    deadline = time.monotonic() + timeout
    if trouble := _ask_together([_nats_question(server, environ, deadline)], deadline)[0]:
        raise _nats_error(server, environ, trouble, timeout)


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
    addresses: list[Address]
    auth: EtcdAuth
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> _Etcd:
        endpoints = etcd_endpoints(environ)
        addresses = [read_address(url, 2379, ("http", "https"), "ETCD_ENDPOINTS") for url in endpoints]
        if not endpoints:
            raise UsageError(
                "ETCD_ENDPOINTS names no endpoint", needed="http://HOST:PORT, or several with commas between"
            )
        auth = EtcdAuth.of(environ)
        secured = any(address.scheme == "https" for address in addresses)
        return cls(endpoints, addresses, auth, auth.tls() if secured else None)

    def questions(self, deadline: float) -> list[Callable[[], Trouble | str | None]]:
        return [partial(_probe_etcd, address, self.tls, deadline) for address in self.addresses]

    def alive(self, troubles: Sequence[Trouble | None], timeout: float) -> list[str]:
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


def _nats_error(server: str, environ: Mapping[str, str], trouble: Trouble, timeout: float) -> BootstrapError:
    if trouble.error is not None:
        return trouble.error
    if trouble.refused:
        return nats_refusal(shown(server), trouble.text, NatsAuth.of(environ))
    return nats_absence(shown(server), trouble.text, timeout)


def _nats_question(server: str, environ: Mapping[str, str], deadline: float) -> Callable[[], Trouble | None]:
    address, auth = read_address(server, 4222, ("nats", "tls"), "NATS_SERVER"), NatsAuth.of(environ)
    installed = runtime_version()
    require_nats(address.scheme == "tls", auth, installed)
    return partial(probe_nats, address, auth, auth.tls(), deadline, installed)


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


def _ask_together(questions: Sequence[Callable[[], Trouble | str | None]], deadline: float) -> list[Trouble | None]:
    """Ask all at once. A thread that doesn't end in time is left behind: a name look-up knows no timeout."""
    answers: list[Trouble | None] = [Trouble(LATE)] * len(questions)

    def ask(index: int) -> None:
        try:
            answer = questions[index]()
            answers[index] = Trouble(answer) if isinstance(answer, str) else answer
        except BootstrapError as error:
            answers[index] = Trouble(error.found, error=error)
        except OSError as error:
            answers[index] = Trouble(reason_of(error), refused=is_refusal(error))

    threads = [
        threading.Thread(target=ask, args=(index,), name="probe", daemon=True) for index in range(len(questions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


def _probe_etcd(address: Address, tls: ssl.SSLContext | None, deadline: float) -> str | None:
    """Return what is wrong with one etcd endpoint, or None."""
    with socket.create_connection((address.host, address.port), timeout=left(deadline)) as sock:
        sock.settimeout(left(deadline))
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


def _get_health(sock: socket.socket, address: Address, deadline: float) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    # HTTP/1.0: the reply ends with the connection, and never comes in chunks
    question = f"GET /health HTTP/1.0\r\nHost: {host}:{address.port}\r\n\r\n".encode()
    # one that refuses our certificate has hung up by now, and what it said of that is still to be read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(question)
    return receive(sock, deadline)
