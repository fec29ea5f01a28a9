# SPDX-License-Identifier: Apache-2.0
"""Check that NATS answers and accepts our credentials.

NATS sends one line first, ``INFO {...}``; then follow TLS, if that line or the address asks for it, our ``CONNECT {...}`` and a ``PING``;
``PONG`` means that we are accepted. Written here and not with nats-py, whose errors are misleading: it starts TLS on a ``nats://`` address,
which Dynamo's runtime doesn't, and for a rejected client certificate it reports "Connection lost" (2.16).
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError
from dynamo_mpi.discovery.endpoints import (
    MAX_BYTES,
    ConnectivityError,
    is_certificate_refusal,
    remaining,
    short_reason,
)
from dynamo_mpi.discovery.runtime_compat import require_nats

if TYPE_CHECKING:
    from dynamo_mpi.discovery.endpoints import Address
    from dynamo_mpi.discovery.nats_auth import NatsAuth

_REFUSAL_TEXTS = ("authori", "authent", "revoked", "expired")


def check_nats(
    address: Address, auth: NatsAuth, tls: ssl.SSLContext, deadline: float, installed: tuple[int, ...] | None = None
) -> None:
    """Connect, log in, disconnect.

    Args:
        address: NATS's address.
        auth: our credentials.
        tls: for the connection, if NATS or the address asks for it.
        deadline: of the monotonic clock.
        installed: the version of Dynamo's runtime; None if it isn't known.

    Raises:
        ConnectivityError: it isn't NATS, or rejects our credentials.
        UsageError: Dynamo's runtime can't do what NATS requires.
        OSError: it can't be reached, or does not answer in time.
    """
    expiry = auth.expiry()
    if expiry is not None and expiry < time.time():
        day = time.strftime("%Y-%m-%d", time.gmtime(expiry))
        raise ConnectivityError(f"NATS_AUTH_CREDENTIALS_FILE has expired on {day}", refused=True)
    with contextlib.ExitStack() as stack:
        place = (address.host, address.port)
        connection = stack.enter_context(socket.create_connection(place, timeout=remaining(deadline)))
        info = _read_info(connection, deadline)
        required, wants_tls = bool(info.get("tls_required")), address.scheme == "tls"
        require_nats(wants_tls, auth, installed, tls_required=required)
        if wants_tls:
            if not (required or info.get("tls_available")):
                raise ConnectivityError("NATS_SERVER says tls://, and this NATS has no TLS")
            connection.settimeout(remaining(deadline))
            connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=address.host))
        options = {"verbose": False, "pedantic": False, "lang": "python", "version": "0", "name": "dynamo_mpi"}
        if auth.uses_nkey:
            if find_spec("nkeys") is None:
                return  # without the library the credentials can't be checked
            try:
                options |= auth.sign_nonce(str(info.get("nonce", "")))
            except ValueError as error:
                raise ConnectivityError(str(error), refused=True) from None
        _log_in(connection, {**options, **auth.connect_options()}, deadline, bool(info.get("tls_verify")))


def _log_in(connection: socket.socket, options: dict[str, Any], deadline: float, sees_certificate: bool) -> None:
    # a server that rejects our certificate has closed the connection by now, but its reason can still be read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        connection.settimeout(remaining(deadline))
        connection.sendall(f"CONNECT {json.dumps(options)}\r\nPING\r\n".encode())
    closed = f"it closed the connection when it saw {'our certificate' if sees_certificate else 'our credentials'}"
    try:
        line = _read_line(connection, deadline)
        while line.startswith((b"INFO", b"+OK", b"PING")):
            line = _read_line(connection, deadline)
    except (ConnectionResetError, ssl.SSLEOFError):
        raise ConnectivityError(closed, refused=True) from None
    except OSError as error:
        if is_certificate_refusal(error):
            raise ConnectivityError(_printable(short_reason(error)), refused=True) from None
        raise
    if not line.startswith(b"PONG"):
        text = line[4:].strip(b" '\r\n").decode("utf-8", "replace") if line.startswith(b"-ERR") else ""
        refused = not text or any(word in text.lower() for word in _REFUSAL_TEXTS)
        raise ConnectivityError(_printable(text) or closed, refused=refused)


def _read_info(connection: socket.socket, deadline: float) -> dict[str, Any]:
    line = _read_line(connection, deadline, b"INFO ")
    with contextlib.suppress(ValueError, RecursionError):
        content: Any = json.loads(line[5:]) if line.startswith(b"INFO ") else None
        if isinstance(content, dict):
            return content
    raise ConnectivityError("something else than NATS listens there")


def _read_line(connection: socket.socket, deadline: float, begin: bytes = b"") -> bytes:
    """Read a line, or only its beginning if that is wrong. A socket's own timeout restarts with every byte."""
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_BYTES and data[: len(begin)] == begin[: len(data)]:
        connection.settimeout(remaining(deadline))
        # byte by byte: the line may be followed by another, or by a TLS handshake
        part = connection.recv(1)
        if not part:
            break
        data += part
    return data


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]


def nats_unanswered(server: str, text: str, seconds: float) -> DiscoveryError:
    """Return the error of a worker that can't use NATS.

    Args:
        server: its address.
        text: the problem.
        seconds: the time limit.
    """
    if "certificate verify failed" in text:
        return DiscoveryError(
            f"NATS shows a certificate that isn't to be trusted ({server}: {text})",
            expected="one of an authority that this worker knows, for this address, and not expired",
            fix="set NATS_TLS_CA_CERT_PATH to that authority's certificate, or renew NATS's own",
        )
    return DiscoveryError(
        f"NATS does not answer ({server}: {text})",
        expected=f"a NATS server that answers within {seconds:g} s",
        fix="start nats-server on the head node and set NATS_SERVER=nats://HOST:4222, "
        "or leave NATS_SERVER unset and use the tcp request plane",
    )


def nats_refused(server: str, text: str, auth: NatsAuth) -> AuthorizationError:
    """Return the error of a worker that NATS rejects.

    Args:
        server: its address.
        text: its answer.
        auth: our credentials.
    """
    if "certificate" in text.lower() or "unknown_ca" in text.lower().replace(" ", "_"):
        what = "this worker's certificate" if auth.certificate else "a worker without a certificate"
        return AuthorizationError(
            f"NATS refuses {what} ({server}: {text})",
            expected="a certificate of the authority that NATS trusts (ca_file of its tls block), for clients, and not expired",
            fix="set NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH; openssl x509 -noout -text shows what a certificate is",
        )
    if not auth.kind:
        return AuthorizationError(
            f"NATS requires credentials, and none are set ({server}: {text})",
            expected="credentials that NATS knows",
            fix="set NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, NATS_AUTH_TOKEN, NATS_AUTH_NKEY or NATS_AUTH_CREDENTIALS_FILE",
        )
    return AuthorizationError(
        f"NATS refuses this worker's credentials ({server}: {text})",
        expected="credentials that NATS knows, and that have not expired",
        fix=f"correct {auth.kind}, which counts before any other that is set",
    )
