# SPDX-License-Identifier: Apache-2.0
"""What the probes of etcd and NATS have in common: an address, a deadline, and what can be wrong."""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.errors import UsageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from dynamo_mpi.errors import BootstrapError

LATE = "no answer in time"
MOST_BYTES = 65536


class Address(NamedTuple):
    """Where a server is."""

    scheme: str
    host: str
    port: int


class Trouble(NamedTuple):
    """What is wrong with a server.

    Args:
        text: in a few words.
        refused: it has found fault with who we are.
        error: what to end with, where that is known already.
    """

    text: str
    refused: bool = False
    error: BootstrapError | None = None

    def __str__(self) -> str:
        return self.text


def receive(sock: socket.socket, deadline: float, enough: int = MOST_BYTES) -> bytes:
    """Read until the other side closes, or ``enough`` bytes have come. A socket's own timeout begins anew with every byte."""
    data = b""
    while len(data) < enough:
        sock.settimeout(left(deadline))
        part = sock.recv(4096)
        if not part:
            break
        data += part
    return data


def read_address(url: str, default_port: int, schemes: Sequence[str], variable: str) -> Address:
    """Read an address.

    Args:
        url: what is given; the scheme may be left out.
        default_port: where none is given.
        schemes: those that may be, the usual one first.
        variable: where it comes from.

    Raises:
        UsageError: it can't be read.
    """
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
    return Address(parts.scheme, host, port)


def shown(url: str) -> str:
    """Return the address without credentials that may stand in it."""
    return url.rpartition("@")[2] if "@" in url else url


def left(deadline: float) -> float:
    """Return the seconds until then.

    Raises:
        TimeoutError: there are none.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def is_refusal(error: Exception) -> bool:
    """Did the other side find fault with our certificate? Since TLS 1.3 it says so only in the place of its first answer."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "_ALERT_" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED"))


def reason_of(error: OSError) -> str:
    """Say in a few words what went wrong."""
    if isinstance(error, TimeoutError):
        return LATE
    return error.strerror.lower() if error.strerror else str(error) or type(error).__name__
