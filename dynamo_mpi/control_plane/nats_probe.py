# SPDX-License-Identifier: Apache-2.0
"""Ask NATS whether it is there and takes our credentials: its handshake by hand, so that nothing has to be installed or loaded for it.

NATS speaks first, one line, ``INFO {...}``; then comes TLS where that line or the address asks for it, then our ``CONNECT {...}`` and
a ``PING``. ``PONG`` means that we are in.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dynamo_mpi.control_plane.asking import MOST_BYTES, Trouble, is_refusal, left, reason_of
from dynamo_mpi.control_plane.runtime_limits import require_nats
from dynamo_mpi.errors import AuthorisationError, DiscoveryError

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.asking import Address
    from dynamo_mpi.control_plane.nats_auth import NatsAuth

_SOMETHING_ELSE = "something else than NATS listens there"
_WORDS = ("authori", "authent", "revoked", "expired")


def probe_nats(
    address: Address, auth: NatsAuth, tls: ssl.SSLContext, deadline: float, installed: tuple[int, ...] | None = None
) -> Trouble | None:
    """Return what is wrong with the NATS server, or None.

    Args:
        address: where it is.
        auth: who we are.
        tls: for the connection, where NATS or the address wants that.
        deadline: of the monotonic clock.
        installed: the version of Dynamo's runtime; None where it isn't known.

    Raises:
        UsageError: Dynamo's runtime can't do what NATS wants.
        OSError: it can't be reached, or is late.
    """
    expiry = auth.expiry()
    if expiry is not None and expiry < time.time():
        return Trouble(
            f"NATS_AUTH_CREDENTIALS_FILE has expired on {time.strftime('%Y-%m-%d', time.gmtime(expiry))}", True
        )
    with socket.create_connection((address.host, address.port), timeout=left(deadline)) as plain:
        info = _info(_line(plain, deadline, b"INFO "))
        if info is None:
            return Trouble(_SOMETHING_ELSE)
        wants_tls = address.scheme == "tls"
        require_nats(wants_tls, auth, installed, tls_required=bool(info.get("tls_required")))
        if wants_tls and not (info.get("tls_required") or info.get("tls_available")):
            return Trouble("NATS_SERVER says tls://, and this NATS has no TLS")
        if not wants_tls:
            return _introduce(plain, info, auth, deadline)
        plain.settimeout(left(deadline))
        with tls.wrap_socket(plain, server_hostname=address.host) as secured:
            return _introduce(secured, info, auth, deadline)


def nats_absence(server: str, text: str, seconds: float) -> DiscoveryError:
    """Return the error of a worker that can't speak to NATS.

    Args:
        server: its address.
        text: what is wrong.
        seconds: that it had.
    """
    if "certificate verify failed" in text:
        return DiscoveryError(
            f"NATS shows a certificate that isn't to be trusted ({server}: {text})",
            needed="one of an authority that this worker knows, for this address, and not expired",
            fix="set NATS_TLS_CA_CERT_PATH to that authority's certificate, or renew NATS's own",
        )
    return DiscoveryError(
        f"NATS does not answer ({server}: {text})",
        needed=f"a NATS server that answers within {seconds:g} s",
        fix="start nats-server on the head node and set NATS_SERVER=nats://HOST:4222, "
        "or leave NATS_SERVER unset and use the tcp request plane",
    )


def nats_refusal(server: str, text: str, auth: NatsAuth) -> AuthorisationError:
    """Return the error of a worker that NATS does not let in.

    Args:
        server: its address.
        text: what it has said.
        auth: who we are.
    """
    if "certificate" in text.lower() or "unknown_ca" in text.lower().replace(" ", "_"):
        what = "this worker's certificate" if auth.certificate else "a worker without a certificate"
        return AuthorisationError(
            f"NATS refuses {what} ({server}: {text})",
            needed="a certificate of the authority that NATS trusts (ca_file of its tls block), for clients, and not expired",
            fix="set NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH; openssl x509 -noout -text shows what a certificate is",
        )
    if not auth.kind:
        return AuthorisationError(
            f"NATS wants to know who this worker is, and no credentials are set ({server}: {text})",
            needed="credentials that NATS knows",
            fix="set NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, NATS_AUTH_TOKEN, NATS_AUTH_NKEY or NATS_AUTH_CREDENTIALS_FILE",
        )
    return AuthorisationError(
        f"NATS refuses this worker's credentials ({server}: {text})",
        needed="credentials that NATS knows, and that have not expired",
        fix=f"correct {auth.kind}, which counts before any other that is set",
    )


def _introduce(connection: socket.socket, info: dict[str, Any], auth: NatsAuth, deadline: float) -> Trouble | None:
    words = {"verbose": False, "pedantic": False, "lang": "python", "version": "0", "protocol": 1, "name": "dynamo_mpi"}
    if auth.signs:
        try:
            signed = _signed(info, auth)
        except ValueError as error:
            return Trouble(str(error), True)
        if signed is None:
            return None  # whether they are right can't be seen without the library
        words |= signed
    words |= auth.words()
    # one that refuses our certificate has hung up by now, and what it said of that is still to be read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        connection.settimeout(left(deadline))
        connection.sendall(f"CONNECT {json.dumps(words)}\r\nPING\r\n".encode())
    hung_up = f"it hung up when it saw {'our certificate' if info.get('tls_verify') else 'who we are'}"
    try:
        line = _line(connection, deadline, b"")
        while line.startswith((b"INFO", b"+OK", b"PING")):
            line = _line(connection, deadline, b"")
    except (ConnectionResetError, ssl.SSLEOFError):
        return Trouble(hung_up, True)
    except OSError as error:
        if is_refusal(error):
            return Trouble(_said(reason_of(error)), True)
        raise
    if line.startswith(b"PONG"):
        return None
    text = line[4:].strip(b" '\r\n").decode("utf-8", "replace") if line.startswith(b"-ERR") else ""
    return Trouble(_said(text) or hung_up, not text or any(word in text.lower() for word in _WORDS))


def _said(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]


def _signed(info: dict[str, Any], auth: NatsAuth) -> dict[str, str] | None:
    """Return the answer to NATS's challenge; None where there is no library for it.

    Raises:
        ValueError: what is to be signed with is no key.
    """
    if find_spec("nkeys") is None:
        return None
    import nkeys

    jwt, seed = auth.signer()
    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        signature = base64.b64encode(pair.sign(str(info.get("nonce", "")).encode())).decode()
        return {"sig": signature, **({"jwt": jwt} if jwt else {"nkey": pair.public_key.decode()})}
    except Exception:  # the library's own, and what base64 and libsodium raise
        raise ValueError("it holds no key") from None


def _info(line: bytes) -> dict[str, Any] | None:
    try:
        content: Any = json.loads(line[5:]) if line.startswith(b"INFO ") else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _line(connection: socket.socket, deadline: float, begin: bytes) -> bytes:
    """Read a line, or what there is of one that doesn't begin as it should. A socket's own timeout begins anew with every byte."""
    data = b""
    while not data.endswith(b"\n") and len(data) < MOST_BYTES and data[: len(begin)] == begin[: len(data)]:
        connection.settimeout(left(deadline))
        # one byte of a line that may be followed by another, or by a TLS handshake
        part = connection.recv(1)
        if not part:
            break
        data += part
    return data
