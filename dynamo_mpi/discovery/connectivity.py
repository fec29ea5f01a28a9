# SPDX-License-Identifier: Apache-2.0
"""Check that etcd and NATS answer, before the Dynamo runtime connects to them.

The runtime waits up to 120 s for either and holds Python's global lock meanwhile, so that not even a signal is handled. A check with a
deadline costs milliseconds if all is well.
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

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, UsageError
from dynamo_mpi.discovery.endpoints import (
    LATE,
    Address,
    ConnectivityError,
    is_certificate_refusal,
    read_address,
    receive,
    remaining,
    short_reason,
    strip_credentials,
)
from dynamo_mpi.discovery.etcd import DEFAULT_PORT, EtcdAuth, etcd_endpoints
from dynamo_mpi.discovery.nats_auth import NatsAuth
from dynamo_mpi.discovery.nats_check import check_nats, nats_refused, nats_unanswered
from dynamo_mpi.discovery.runtime_compat import require_nats, runtime_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Problem = ConnectivityError | DynamoMpiError

DEFAULT_NATS = "nats://localhost:4222"


def nats_server(environ: Mapping[str, str], request_plane: str) -> str | None:
    """Return the NATS server that the Dynamo runtime will connect to; None if it won't.

    It connects whenever ``NATS_SERVER`` is set, whatever the request plane.
    """
    if given := environ.get("NATS_SERVER"):
        return given
    return DEFAULT_NATS if request_plane == "nats" else None


def check_connectivity(environ: Mapping[str, str], request_plane: str, timeout: float) -> list[str]:
    """Check that etcd answers, and NATS if it is used.

    Args:
        environ: has their addresses and our credentials.
        request_plane: ``"tcp"`` or ``"nats"``.
        timeout: seconds for all of them together.

    Returns:
        The etcd endpoints, those that answer come first: the runtime gives up if the first of several is dead.

    Raises:
        DiscoveryError: no etcd endpoint answers, or NATS doesn't.
        AuthorizationError: etcd rejects this client's certificate, or requires one; or NATS rejects our credentials.
        UsageError: an address, or a value of ``ETCD_AUTH_*``, ``NATS_AUTH_*`` or ``NATS_TLS_*``, can't be used.
    """
    server = nats_server(environ, request_plane)
    deadline = time.monotonic() + timeout
    etcd = _Etcd.from_env(environ)
    checks = etcd.checks(deadline)
    if server:
        checks.append(_nats_check(server, environ, deadline))
    problems = _run_together(checks, deadline)
    nats_problem = problems.pop() if server else None
    alive = etcd.alive(problems, timeout)
    if server and nats_problem:
        raise _nats_error(server, environ, nats_problem, timeout)
    return alive + [url for url in etcd.endpoints if url not in alive]


def require_nats_server(server: str, environ: Mapping[str, str], timeout: float) -> None:
    """Check that NATS answers and accepts our credentials.

    Raises:
        DiscoveryError: it doesn't answer.
        AuthorizationError: it rejects them.
        UsageError: its address, or a value of ``NATS_AUTH_*`` or ``NATS_TLS_*``, can't be used.
    """
    deadline = time.monotonic() + timeout
    if problem := _run_together([_nats_check(server, environ, deadline)], deadline)[0]:
        raise _nats_error(server, environ, problem, timeout)


def check_etcd_endpoints(environ: Mapping[str, str], timeout: float) -> dict[str, str]:
    """Check etcd alone.

    Returns:
        By endpoint, its problem; empty if it answers.

    Raises:
        DiscoveryError: no endpoint answers.
        AuthorizationError: etcd rejects this client's certificate, or requires one.
        UsageError: an address, or a certificate in ``ETCD_AUTH_*``, can't be read.
    """
    deadline = time.monotonic() + timeout
    etcd = _Etcd.from_env(environ)
    problems = _run_together(etcd.checks(deadline), deadline)
    etcd.alive(problems, timeout)
    return {url: str(problem or "") for url, problem in zip(etcd.endpoints, problems, strict=True)}


class _Etcd(NamedTuple):
    """etcd's endpoints, and our credentials."""

    endpoints: list[str]
    addresses: list[Address]
    auth: EtcdAuth
    tls: ssl.SSLContext | None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> _Etcd:
        endpoints = etcd_endpoints(environ)
        addresses = [read_address(url, DEFAULT_PORT, ("http", "https"), "ETCD_ENDPOINTS") for url in endpoints]
        if not endpoints:
            raise UsageError(
                "ETCD_ENDPOINTS names no endpoint",
                expected="http://HOST:PORT, or several with commas between",
                fix="set it to etcd's addresses, or unset it for http://localhost:2379",
            )
        auth = EtcdAuth.from_env(environ)
        secured = any(address.scheme == "https" for address in addresses)
        return cls(endpoints, addresses, auth, auth.tls() if secured else None)

    def checks(self, deadline: float) -> list[Callable[[], None]]:
        return [partial(_check_health, address, self.tls, deadline) for address in self.addresses]

    def alive(self, problems: Sequence[Problem | None], timeout: float) -> list[str]:
        """Return the endpoints that answer; raises if none does."""
        alive = [url for url, problem in zip(self.endpoints, problems, strict=True) if problem is None]
        if alive:
            return alive
        listed = "; ".join(
            f"{strip_credentials(url)}: {problem}" for url, problem in zip(self.endpoints, problems, strict=True)
        )
        if any(isinstance(problem, ConnectivityError) and problem.refused for problem in problems):
            raise _etcd_refused(listed, self.auth)
        raise DiscoveryError(
            f"etcd does not answer ({listed})",
            expected=f"an etcd that answers within {timeout:g} s",
            fix="start etcd on the head node, or set ETCD_ENDPOINTS=http://HOST:2379",
        )


def _etcd_refused(listed: str, auth: EtcdAuth) -> AuthorizationError:
    if auth.certificate:
        return AuthorizationError(
            f"etcd refuses this worker's certificate ({listed})",
            expected="a client certificate that is signed by etcd's authority (its --trusted-ca-file) and not expired",
            fix="correct ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY; openssl x509 -noout -text shows the certificate",
        )
    return AuthorizationError(
        f"etcd refuses a worker without a certificate ({listed})",
        expected="a client certificate",
        fix="set ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY to PEM texts",
    )


def _nats_check(server: str, environ: Mapping[str, str], deadline: float) -> Callable[[], None]:
    address, auth = read_address(server, 4222, ("nats", "tls"), "NATS_SERVER"), NatsAuth.from_env(environ)
    installed = runtime_version()
    require_nats(address.scheme == "tls", auth, installed)
    return partial(check_nats, address, auth, auth.tls(), deadline, installed)


def _nats_error(server: str, environ: Mapping[str, str], problem: Problem, timeout: float) -> DynamoMpiError:
    if isinstance(problem, DynamoMpiError):
        return problem
    name = strip_credentials(server)
    if problem.refused:
        return nats_refused(name, problem.text, NatsAuth.from_env(environ))
    return nats_unanswered(name, problem.text, timeout)


def _run_together(checks: Sequence[Callable[[], None]], deadline: float) -> list[Problem | None]:
    """Run all at once. A thread that does not end in time is abandoned: the look-up of a name has no timeout."""
    problems: list[Problem | None] = [ConnectivityError(LATE)] * len(checks)

    def run(index: int) -> None:
        try:
            checks[index]()
            problems[index] = None
        except (DynamoMpiError, ConnectivityError) as error:
            problems[index] = error
        except OSError as error:
            problems[index] = ConnectivityError(short_reason(error), refused=is_certificate_refusal(error))

    threads = [threading.Thread(target=run, args=(index,), name="probe", daemon=True) for index in range(len(checks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(problems)


def _check_health(address: Address, tls: ssl.SSLContext | None, deadline: float) -> None:
    """Raise a ConnectivityError unless this endpoint of etcd reports that it is healthy."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(
            socket.create_connection((address.host, address.port), timeout=remaining(deadline))
        )
        if address.scheme == "https" and tls is not None:
            connection.settimeout(remaining(deadline))
            connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=address.host))
        host = f"[{address.host}]" if ":" in address.host else address.host
        connection.settimeout(remaining(deadline))
        # a server that rejects our certificate has closed the connection by now, but its reason can still be read
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # HTTP/1.0: the reply ends with the connection, and never comes in chunks
            connection.sendall(f"GET /health HTTP/1.0\r\nHost: {host}:{address.port}\r\n\r\n".encode())
        reply = receive(connection, deadline)
    if not reply:
        raise ConnectivityError("it closed the connection without an answer")
    try:
        body = json.loads(reply.partition(b"\r\n\r\n")[2])
    except (ValueError, RecursionError):
        body = None
    if not reply.startswith(b"HTTP/") or not isinstance(body, dict) or "health" not in body:
        raise ConnectivityError("something else than etcd listens there")
    if str(body["health"]).lower() != "true":
        raise ConnectivityError(f"etcd says it is not healthy: {body.get('reason') or body}")
