# SPDX-License-Identifier: Apache-2.0
"""The TCP protocol between decode and prefill ranks: messages as frames, and a socket with one deadline.

    prefill: Hello(nonce)
    decode:  Fetch(transfer, layers, heads)   prefill: Shard(shape, size, checksum) and the keys and values, or Refused
    decode:  Release(transfer)                prefill: Released, or Refused

A frame is a header of fixed size and a body of at most `MOST_BODY` bytes, made of integers of fixed width: received data is never executed
or unpickled. Both sides know the transfer's secret and prove it by an HMAC over the nonce and the frame. The HMAC of a ``Shard`` covers the
payload's CRC-32, which detects accidental damage; encrypt the network if attackers may change the data.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
import zlib
from dataclasses import dataclass, replace
from typing import TypeVar

MAGIC = b"DMK1"
MOST_BODY = 512
NONCE_BYTES = 16
TRANSFER_ID_BYTES = 16
SECRET_BYTES = 32
FLOAT32 = 1
"""The only number format: little-endian float32."""

_HEADER = struct.Struct("!4sB3xI")
HEADER_BYTES = _HEADER.size
_MAC_BYTES = 32
_NO_MAC = bytes(_MAC_BYTES)
_FETCH = struct.Struct(f"!{TRANSFER_ID_BYTES}s4I")
_SHARD = struct.Struct("!4I2IBQI")
_MOST_REASON = 300


class WireError(ValueError):
    """The data is not a frame of this protocol, or not the expected one."""


@dataclass(frozen=True)
class Hello:
    """Opens a connection; its ``nonce`` makes HMACs valid on this connection only."""

    nonce: bytes


@dataclass(frozen=True)
class Fetch:
    """Requests layers x KV heads of one transfer, both in the model's numbers."""

    transfer_id: bytes
    layers: range
    heads: range
    mac: bytes = _NO_MAC


@dataclass(frozen=True)
class Shard:
    """Announces the payload ``[keys and values, layers, heads, tokens, head_dim]``, ``size`` bytes with CRC-32 ``checksum``."""

    layers: range
    heads: range
    tokens: int
    head_dim: int
    dtype: int
    size: int
    checksum: int
    mac: bytes = _NO_MAC


@dataclass(frozen=True)
class Release:
    """This transfer will not be fetched any more."""

    transfer_id: bytes
    mac: bytes = _NO_MAC


@dataclass(frozen=True)
class Released:
    """The transfer's KV has been removed."""


@dataclass(frozen=True)
class Refused:
    """The reason of a refusal; nothing follows on this connection."""

    reason: str


SignedMessage = Fetch | Shard | Release
Message = Hello | SignedMessage | Released | Refused
Signed = TypeVar("Signed", bound=SignedMessage)
_KINDS: dict[type[Message], int] = {
    Hello: 1,
    Fetch: 2,
    Shard: 3,
    Release: 4,
    Released: 5,
    Refused: 6,
}


def sign(message: Signed, secret: bytes, nonce: bytes) -> Signed:
    """Return ``message`` with the HMAC that proves that its sender knows ``secret``."""
    return replace(message, mac=_mac(message, secret, nonce))


def is_signed(message: SignedMessage, secret: bytes, nonce: bytes) -> bool:
    """Return, in constant time, whether ``sign`` made ``message`` with this secret on this connection."""
    return hmac.compare_digest(message.mac, _mac(message, secret, nonce))


def encode(message: Message) -> bytes:
    """Return the frame."""
    body = _body(message)
    return _HEADER.pack(MAGIC, _KINDS[type(message)], len(body)) + body


def body_size(header: bytes) -> int:
    """Return how many bytes follow a header.

    Raises:
        WireError: it is invalid, or announces too many.
    """
    return _read_header(header)[1]


def decode(frame: bytes) -> Message:
    """Return the message of one whole frame.

    Raises:
        WireError: ``frame`` is invalid, incomplete, or has extra bytes.
    """
    kind, size = _read_header(frame[:HEADER_BYTES])
    body = frame[HEADER_BYTES:]
    if len(body) != size:
        raise WireError(f"a frame of {size} bytes has {len(body)}")
    try:
        return _parse(kind, body)
    except struct.error as error:
        raise WireError(f"a frame of kind {kind} can't have {size} bytes: {error}") from None


def _read_header(header: bytes) -> tuple[int, int]:
    if len(header) != HEADER_BYTES:
        raise WireError(f"a header has {HEADER_BYTES} bytes, not {len(header)}")
    magic, kind, size = _HEADER.unpack(header)
    if magic != MAGIC or header != _HEADER.pack(magic, kind, size):
        raise WireError("the peer uses another protocol, or another version of it")
    if kind not in _KINDS.values():
        raise WireError(f"there is no frame of kind {kind}")
    if size > MOST_BODY:
        raise WireError(f"a frame announces {size} bytes, more than {MOST_BODY}")
    return kind, size


def _parse(kind: int, body: bytes) -> Message:
    if kind == _KINDS[Hello]:
        if len(body) != NONCE_BYTES:
            raise WireError(f"a nonce has {NONCE_BYTES} bytes, not {len(body)}")
        return Hello(body)
    if kind == _KINDS[Fetch]:
        unsigned, mac = _split(body)
        transfer_id, *edges = _FETCH.unpack(unsigned)
        return Fetch(transfer_id, _range(edges[:2]), _range(edges[2:]), mac)
    if kind == _KINDS[Shard]:
        unsigned, mac = _split(body)
        *edges, tokens, head_dim, dtype, size, checksum = _SHARD.unpack(unsigned)
        return Shard(_range(edges[:2]), _range(edges[2:]), tokens, head_dim, dtype, size, checksum, mac)
    if kind == _KINDS[Release]:
        unsigned, mac = _split(body)
        if len(unsigned) != TRANSFER_ID_BYTES:
            raise WireError(f"a transfer id has {TRANSFER_ID_BYTES} bytes, not {len(unsigned)}")
        return Release(unsigned, mac)
    if kind == _KINDS[Released]:
        if body:
            raise WireError("a frame without contents has some")
        return Released()
    # the peer is not trusted: no control characters in logs
    return Refused("".join(c if c.isprintable() else "?" for c in body.decode(errors="replace")))


def _body(message: Message) -> bytes:
    if isinstance(message, Hello):
        return message.nonce
    if isinstance(message, Released):
        return b""
    if isinstance(message, Refused):
        return message.reason.encode(errors="replace")[:_MOST_REASON]
    return _unsigned(message) + message.mac


def _unsigned(message: SignedMessage) -> bytes:
    if isinstance(message, Release):
        return message.transfer_id
    edges = (message.layers.start, message.layers.stop, message.heads.start, message.heads.stop)
    if isinstance(message, Fetch):
        return _FETCH.pack(message.transfer_id, *edges)
    numbers = (message.tokens, message.head_dim, message.dtype, message.size, message.checksum)
    return _SHARD.pack(*edges, *numbers)


def _mac(message: SignedMessage, secret: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, nonce + bytes([_KINDS[type(message)]]) + _unsigned(message), "sha256")


def _split(body: bytes) -> tuple[bytes, bytes]:
    if len(body) < _MAC_BYTES:
        raise WireError(f"a signed frame has only {len(body)} bytes")
    return body[:-_MAC_BYTES], body[-_MAC_BYTES:]


def _range(edges: list[int]) -> range:
    start, stop = edges
    if start >= stop:
        raise WireError(f"{start} to {stop} is nothing")
    return range(start, stop)


_MOST_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock."""

    moment: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the remaining seconds.

        Raises:
            TimeoutError: the deadline has passed.
        """
        seconds = self.moment - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds


class FrameSocket:
    """One connection.

    Args:
        connection: a connected socket; the caller closes it.
        deadline: the deadline of all further operations; it may be changed.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._socket = connection
        self.deadline = deadline

    def send(self, message: Message) -> None:
        """Send one frame."""
        self.send_payload(memoryview(encode(message)))

    def wait_readable(self) -> None:
        """Wait until data has arrived, or the peer has closed the connection.

        Raises:
            TimeoutError: the deadline has passed.
        """
        self._socket.settimeout(self.deadline.left())
        self._socket.recv(1, socket.MSG_PEEK)

    def receive(self) -> Message:
        """Return the next frame.

        Raises:
            WireError: the data is not a frame.
            ConnectionError: the peer has gone.
            TimeoutError: the deadline has passed.
        """
        header = bytearray(HEADER_BYTES)
        self.receive_payload(memoryview(header))
        body = bytearray(body_size(bytes(header)))
        self.receive_payload(memoryview(body))
        return decode(bytes(header + body))

    def send_payload(self, payload: memoryview) -> None:
        """Send bytes."""
        while payload:
            self._socket.settimeout(self.deadline.left())
            payload = payload[self._socket.send(payload) :]

    def receive_payload(self, target: memoryview) -> int:
        """Fill ``target`` and return its CRC-32, which is computed while further parts arrive."""
        checksum = 0
        while target:
            self._socket.settimeout(self.deadline.left())
            count = self._socket.recv_into(target[:_MOST_AT_ONCE])
            if not count:
                raise ConnectionError("the peer closed the connection")
            checksum = zlib.crc32(target[:count], checksum)
            target = target[count:]
        return checksum
