# SPDX-License-Identifier: Apache-2.0
"""As much of HTTP/1.1 as answers to probes and a relay need: one request for each connection. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

END_OF_HEAD = b"\r\n\r\n"
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
_REQUEST = re.compile(rb"([A-Z]+) (/[^ ]*) HTTP/1\.[01]")
# it would keep a connection for requests that are ours to answer
_PER_CONNECTION = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade")


class Request(NamedTuple):
    """The head of a request.

    Args:
        method: as it came.
        path: without the query.
        line: the request's first line.
        fields: its others.
    """

    method: str
    path: str
    line: bytes
    fields: tuple[bytes, ...]

    def relayed(self) -> bytes:
        """Return the head as it is handed on: as it came, but for this connection alone."""
        kept = [field for field in self.fields if field.partition(b":")[0].strip().lower() not in _PER_CONNECTION]
        return b"\r\n".join((self.line, *kept, b"Connection: close")) + END_OF_HEAD


def read_request(head: bytes) -> Request | None:
    """Read a request's head, without the empty line at its end; None where it is none."""
    line, *fields = head.split(b"\r\n")
    match = _REQUEST.fullmatch(line)
    if match is None or not all(b":" in field for field in fields):
        return None
    return Request(match[1].decode(), match[2].partition(b"?")[0].decode("ascii", "replace"), line, tuple(fields))


def response(status: int, content_type: str, body: bytes, *, head_only: bool = False) -> bytes:
    """Return an answer that ends its connection."""
    lines = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + END_OF_HEAD + (b"" if head_only else body)


def status_and_body(answer: bytes) -> tuple[int, bytes]:
    """Read an answer that came as a whole; status 0 where it is none."""
    head, found, body = answer.partition(END_OF_HEAD)
    first, *fields = head.split(b"\r\n")
    words = first.split(b" ")
    if not found or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return 0, b""
    names = {name.strip().lower(): value.strip().lower() for name, _, value in (f.partition(b":") for f in fields)}
    if names.get(b"transfer-encoding") == b"chunked":
        body = _unchunked(body)
    return int(words[1]), body


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        try:
            length = int(size.partition(b";")[0], 16)
        except ValueError:
            return whole
        if not length:
            break
        whole, body = whole + body[:length], body[length + 2 :]
    return whole
