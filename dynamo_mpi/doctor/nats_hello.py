# SPDX-License-Identifier: Apache-2.0
"""Say hello to NATS as its clients do: it speaks first, takes a name and a password, and answers a PING.

The standard library is enough for it. https://docs.nats.io/reference/reference-protocols/nats-protocol has the words.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

_PORT = 4222
_MOST_BYTES = 65536
# of Dynamo's runtime; these want a signature, or a file that holds one
_SIGNED = ("NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE")


class Hello(NamedTuple):
    """What NATS said.

    Args:
        version: of the server.
        refusal: why it doesn't take us; empty where it does, or where that wasn't tried.
        untried: why logging in wasn't tried; empty where it was.
        seconds: from the connection to the last answer.
    """

    version: str
    refusal: str = ""
    untried: str = ""
    seconds: float = 0.0


def credentials(server: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a client says of itself: ``NATS_AUTH_*``, or what stands in the address."""
    if token := environ.get("NATS_AUTH_TOKEN"):
        return {"auth_token": token}
    parts = urlsplit(server)
    user, word = environ.get("NATS_AUTH_USERNAME", ""), environ.get("NATS_AUTH_PASSWORD", "")
    if not user and parts.username:
        user, word = unquote(parts.username), unquote(parts.password or "")
    return {"user": user, "pass": word} if user else {}


def greet(server: str, environ: Mapping[str, str], seconds: float) -> Hello:
    """Connect, log in where the standard library can, and leave.

    Args:
        server: its address, as the runtime has it; `probe` has read it already.
        environ: where the credentials stand.
        seconds: that all of it may take.

    Raises:
        OSError: no answer in time, or the connection broke.
    """
    start = time.monotonic()
    parts = urlsplit(server if "://" in server else f"nats://{server}")
    with socket.create_connection((parts.hostname, parts.port or _PORT), timeout=seconds) as connection:
        info = read_info(_line(connection, start + seconds))
        version = str(info.get("version", ""))
        if parts.scheme == "tls" or info.get("tls_required"):
            return Hello(version, untried="it wants TLS")
        if any(environ.get(name) for name in _SIGNED):
            return Hello(version, untried="a signature would be needed")
        words = {"verbose": False, "pedantic": False, "lang": "python", "version": "0", **credentials(server, environ)}
        connection.sendall(f"CONNECT {json.dumps(words)}\r\nPING\r\n".encode())
        answer = _line(connection, start + seconds)
        refusal = answer.removeprefix("-ERR").strip(" '\r\n") if answer.startswith("-ERR") else ""
        return Hello(version, refusal, seconds=time.monotonic() - start)


def read_info(line: str) -> dict[str, Any]:
    """Read the server's first line, ``INFO {…}``; nothing where it isn't one."""
    try:
        content = json.loads(line.removeprefix("INFO "))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _line(connection: socket.socket, end: float) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        # byte by byte: what follows is the next line's
        part = connection.recv(1)
        if not part:
            break
        data += part
    return data.decode(errors="replace")
