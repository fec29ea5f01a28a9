# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers, deadlines and connection errors: shared by the clients and checks of etcd and NATS."""

from __future__ import annotations

import re
import ssl
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

LATE = "no answer in time"
MAX_BYTES = 65536


class Address(NamedTuple):
    """Where a server listens."""

    scheme: str
    host: str
    port: int


class ConnectivityError(Exception):
    """A server can't be used.

    Args:
        text: the reason, in a few words.
        refused: it has rejected our credentials or our certificate.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.text, self.refused = text, refused


def read_address(url: str, default_port: int, schemes: Sequence[str], variable: str) -> Address:
    """Read an address.

    Args:
        url: its scheme may be left out.
        default_port: if the URL has none.
        schemes: those that are allowed, the usual one first.
        variable: the variable that has the URL, for the message.

    Raises:
        UsageError: it can't be read.
    """
    try:
        parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
        host, port = parts.hostname or "", parts.port or default_port
        # the look-up of the name does the same, and fails for labels that are empty or too long
        host.encode("idna")
        readable = parts.scheme in schemes and host != ""
    except ValueError:
        readable = False
    if not readable:
        raise UsageError(
            f"{variable}: {strip_credentials(url)} can't be read",
            expected=f"{schemes[0]}://HOST:PORT",
            fix=f"correct {variable}",
        )
    return Address(parts.scheme, host, port)


def strip_credentials(url: str) -> str:
    """Return an address without the user and password that it may contain."""
    # a password may contain "://" as well
    found = re.match(r"[a-z]+://", url)
    scheme = found[0] if found else ""
    return scheme + url[len(scheme) :].rpartition("@")[2]


def remaining(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def receive(connection: socket.socket, deadline: float) -> bytes:
    """Read until the other side closes, at most `MAX_BYTES`. A socket's own timeout restarts with every byte."""
    data = b""
    while len(data) < MAX_BYTES:
        connection.settimeout(remaining(deadline))
        part = connection.recv(4096)
        if not part:
            break
        data += part
    return data


def is_certificate_refusal(error: Exception) -> bool:
    """Return whether the server rejected our certificate. With TLS 1.3, the rejection arrives only instead of its first answer."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "_ALERT_" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED"))


def short_reason(error: Exception) -> str:
    """Return the reason of an error in a few words."""
    if isinstance(error, TimeoutError):
        return LATE
    text = error.strerror if isinstance(error, OSError) else None
    return text.lower() if text else str(error) or type(error).__name__
