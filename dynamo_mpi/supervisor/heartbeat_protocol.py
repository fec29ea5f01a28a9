# SPDX-License-Identifier: Apache-2.0
"""The protocol of the heartbeat connections between rank 0 and the other ranks. Pure.

    rank 0: HELLO(nonce)
    rank:   JOIN(rank, nonce, MAC)
    rank 0: WELCOME(MAC)
    rank 0: HEARTBEAT, STACKS_REQUEST, PHASE(name), ABORTING, GOODBYE
    rank:   HEARTBEAT, PHASE(name), TIMINGS(`progress.pack_timings`), STACKS(text), FAILED(exit code, phase, sequence, text),
            SIGNAL(number, repeated), CACHES(JSON), GOODBYE
    agents: AGENT(JSON), between the node agents, see `agent_network`

A frame is a header of fixed size and a body of at most `MAX_BODY` bytes, or `MAX_UNAUTHENTICATED_BODY` before authentication. Received data
is never executed or unpickled. Both sides know the token, which came with the preflight result, and prove it by an HMAC over the other's
nonce; the token itself is never sent. Frames are not protected against changes on the network: encrypt it if that is a risk.
"""

from __future__ import annotations

import hmac
import struct
from enum import IntEnum

from dynamo_mpi.common.codec import decode_strings, encode_strings
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.process import SHUTDOWN_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"DML1"
NONCE_BYTES = 16
TOKEN_BYTES = 32
MAC_BYTES = 32
MAX_BODY = 1 << 16
MAX_UNAUTHENTICATED_BODY = 64
MAX_TEXT = 24_000
"""Characters of a traceback that are sent: in any encoding they fit into a body."""

_HEADER = struct.Struct("!4sB3xI")
_RANK = struct.Struct("!I")


class WireError(ValueError):
    """The data is not a frame of this protocol, or not the expected one."""


class FrameType(IntEnum):
    """The type of a frame."""

    HELLO = 1
    JOIN = 2
    WELCOME = 3
    HEARTBEAT = 4
    STACKS_REQUEST = 5
    STACKS = 6
    FAILED = 7
    GOODBYE = 8
    PHASE = 9
    ABORTING = 10
    SIGNAL = 12
    TIMINGS = 13
    AGENT = 14
    CACHES = 15


class Frame(NamedTuple):
    """One message."""

    kind: FrameType
    body: bytes = b""

    def pack(self) -> bytes:
        """Encode the frame.

        Raises:
            WireError: the body is too long.
        """
        if len(self.body) > MAX_BODY:
            raise WireError(f"a body of {len(self.body)} bytes")
        return _HEADER.pack(MAGIC, self.kind, len(self.body)) + self.body


class FrameDecoder:
    """Decodes received bytes into frames. Buffers at most one incomplete frame."""

    def __init__(self) -> None:
        self.max_body = MAX_UNAUTHENTICATED_BODY
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add bytes and yield the frames that are complete.

        Raises:
            WireError: the data is not of this protocol.
        """
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            magic, kind, size = _HEADER.unpack_from(self._bytes)
            if magic != MAGIC or size > self.max_body:
                raise WireError("not a frame of this protocol")
            if len(self._bytes) < _HEADER.size + size:
                return
            body = bytes(self._bytes[_HEADER.size : _HEADER.size + size])
            del self._bytes[: _HEADER.size + size]
            try:
                yield Frame(FrameType(kind), body)
            except ValueError:
                raise WireError(f"unknown frame type {kind}") from None


class Join(NamedTuple):
    """A rank's answer to HELLO."""

    rank: int
    nonce: bytes
    mac: bytes

    def pack(self) -> bytes:
        """Encode the frame's body."""
        return _RANK.pack(self.rank) + self.nonce + self.mac

    @classmethod
    def unpack(cls, body: bytes) -> Join:
        """Decode the frame's body.

        Raises:
            WireError: the body is invalid.
        """
        if len(body) != _RANK.size + NONCE_BYTES + MAC_BYTES:
            raise WireError("invalid JOIN frame")
        (rank,) = _RANK.unpack_from(body)
        return cls(rank, body[_RANK.size : -MAC_BYTES], body[-MAC_BYTES:])


def rank_mac(token: bytes, hello: bytes, rank: int, nonce: bytes) -> bytes:
    """Return a rank's MAC, which proves that it knows the token, over rank 0's nonce ``hello``."""
    return hmac.digest(token, b"rank" + hello + _RANK.pack(rank) + nonce, "sha256")


def leader_mac(token: bytes, nonce: bytes, rank: int) -> bytes:
    """Return rank 0's MAC, which proves that it knows the token, over the nonce of ``rank``."""
    return hmac.digest(token, b"zero" + nonce + _RANK.pack(rank), "sha256")


def is_valid_mac(given: bytes, expected: bytes) -> bool:
    """Return whether a MAC is the expected one; takes the same time for any MAC."""
    return hmac.compare_digest(given, expected)


class SignalMessage(NamedTuple):
    """A signal that a rank other than 0 got.

    Args:
        number: the signal's number, one of `SHUTDOWN_SIGNALS`.
        repeated: whether it is not that rank's first signal.
    """

    number: int
    repeated: bool

    def pack(self) -> bytes:
        """Encode the frame's body."""
        return bytes(self)

    @classmethod
    def unpack(cls, body: bytes) -> SignalMessage:
        """Decode the frame's body.

        Raises:
            WireError: the body is invalid.
        """
        if len(body) != 2 or body[0] not in SHUTDOWN_SIGNALS or body[1] > 1:
            raise WireError("invalid SIGNAL frame")
        return cls(body[0], bool(body[1]))


class FailureReport(NamedTuple):
    """The report of a rank that can't go on.

    Args:
        exit_code: the exit code for all ranks.
        phase: the rank's phase when it failed.
        sequence: counts this rank's frames of this kind.
        text: the error or traceback.
    """

    exit_code: int
    phase: str
    sequence: int
    text: str

    def pack(self) -> bytes:
        """Encode the frame's body."""
        return encode_strings([str(self.exit_code), self.phase, str(self.sequence), clip(self.text)])

    @classmethod
    def unpack(cls, body: bytes) -> FailureReport:
        """Decode the frame's body.

        Raises:
            WireError: the body is invalid.
        """
        try:
            code, phase, sequence, text = decode_strings(body)
            report = cls(int(code), phase, int(sequence), text)
        except ValueError:
            raise WireError("invalid FAILED frame") from None
        if not 0 < report.exit_code < 256:
            raise WireError("invalid exit code of a failure")
        return report


def clip(text: str) -> str:
    """Return ``text``; of a long one, its beginning and, mostly, its end."""
    text = text.encode("utf-8", "replace").decode()
    if len(text.encode()) <= MAX_BODY - 512:
        return text
    half = MAX_TEXT // 8
    return f"{text[:half]}\n[…]\n{text[-(MAX_TEXT // 2 - half) :]}"
