# SPDX-License-Identifier: Apache-2.0
"""What rank 0 and the other ranks say to each other over their liveness connections, as bytes. Pure.

    rank 0: Hello(nonce)
    rank:   Join(rank, nonce, proof)
    rank 0: Welcome(proof)
    rank 0: Beat, Ask, Phase(name), Ending, Leaving
    rank:   Beat, Phase(name), Spans(what `roll.pack_spans` makes), Stacks(text), Failed(exit code, phase, sequence, text),
            Signal(number, again), Leaving
    agents: Agent(JSON), between the node agents, see `agent_network`

A frame is a header of fixed size and a body of at most `MOST_BODY` bytes; before the proof, of `MOST_STRANGERS_BODY`. Nothing that is
received is run or unpickled. Both sides know the token, which came with the verdict, and prove it by an HMAC over the other's nonce; it never
travels here. Against somebody who alters bytes on their way, encrypt the network.
"""

from __future__ import annotations

import hmac
import signal
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.codec import decode_strings, encode_strings

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"DML1"
NONCE_BYTES = 16
TOKEN_BYTES = 32
PROOF_BYTES = 32
MOST_BODY = 1 << 16
MOST_STRANGERS_BODY = 64
MOST_TEXT = 24_000
"""Characters of a traceback that travel: they fit a body whatever they are, and the end of a traceback says the most."""

_HEADER = struct.Struct("!4sB3xI")
_RANK = struct.Struct("!I")


class WireError(ValueError):
    """What came is no frame of this protocol, or not the one that was due."""


class FrameType(IntEnum):
    """What a frame says."""

    HELLO = 1
    JOIN = 2
    WELCOME = 3
    BEAT = 4
    ASK = 5
    STACKS = 6
    FAILED = 7
    LEAVING = 8
    PHASE = 9
    ENDING = 10
    SIGNAL = 12
    SPANS = 13
    AGENT = 14


class Frame(NamedTuple):
    """One message."""

    kind: FrameType
    body: bytes = b""

    def pack(self) -> bytes:
        """Encode it.

        Raises:
            WireError: its body is too long.
        """
        if len(self.body) > MOST_BODY:
            raise WireError(f"a body of {len(self.body)} bytes")
        return _HEADER.pack(MAGIC, self.kind, len(self.body)) + self.body


class FrameDecoder:
    """Bytes as they come, taken apart into frames. Holds no more than one frame that isn't complete."""

    def __init__(self) -> None:
        self.most_body = MOST_STRANGERS_BODY
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add bytes, and yield the frames that are complete.

        Raises:
            WireError: this is not our protocol.
        """
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            magic, kind, size = _HEADER.unpack_from(self._bytes)
            if magic != MAGIC or size > self.most_body:
                raise WireError("no frame of ours")
            if len(self._bytes) < _HEADER.size + size:
                return
            body = bytes(self._bytes[_HEADER.size : _HEADER.size + size])
            del self._bytes[: _HEADER.size + size]
            try:
                yield Frame(FrameType(kind), body)
            except ValueError:
                raise WireError(f"no kind of frame is {kind}") from None


class Join(NamedTuple):
    """A rank's answer to ``Hello``."""

    rank: int
    nonce: bytes
    proof: bytes

    def pack(self) -> bytes:
        """Encode the frame's body."""
        return _RANK.pack(self.rank) + self.nonce + self.proof

    @classmethod
    def unpack(cls, body: bytes) -> Join:
        """Decode what `encode_strings` made.

        Raises:
            WireError: it isn't that.
        """
        if len(body) != _RANK.size + NONCE_BYTES + PROOF_BYTES:
            raise WireError("no answer to a hello")
        (rank,) = _RANK.unpack_from(body)
        return cls(rank, body[_RANK.size : -PROOF_BYTES], body[-PROOF_BYTES:])


def rank_mac(token: bytes, hello: bytes, rank: int, nonce: bytes) -> bytes:
    """Return the proof that a rank knows the token, for rank 0's nonce ``hello``."""
    return hmac.digest(token, b"rank" + hello + _RANK.pack(rank) + nonce, "sha256")


def leader_mac(token: bytes, nonce: bytes, rank: int) -> bytes:
    """Return the proof that rank 0 knows the token, for the nonce of ``rank``."""
    return hmac.digest(token, b"zero" + nonce + _RANK.pack(rank), "sha256")


def is_valid_mac(given: bytes, right: bytes) -> bool:
    """Tell whether a proof is the right one, in a time that doesn't depend on it."""
    return hmac.compare_digest(given, right)


class SignalMessage(NamedTuple):
    """A signal that came to a rank other than 0.

    Args:
        number: SIGTERM's, SIGINT's or SIGUSR1's.
        again: it is not that rank's first.
    """

    number: int
    again: bool

    def pack(self) -> bytes:
        """Encode the frame's body."""
        return bytes(self)

    @classmethod
    def unpack(cls, body: bytes) -> SignalMessage:
        """Decode what `encode_strings` made.

        Raises:
            WireError: it isn't that.
        """
        if len(body) != 2 or body[0] not in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) or body[1] > 1:
            raise WireError("no signal that ends a worker")
        return cls(body[0], bool(body[1]))


class FailureReport(NamedTuple):
    """What a rank that can't go on says of itself.

    Args:
        exit_code: what every rank is to leave with.
        phase: in which it happened there.
        sequence: counts this rank's frames of this kind.
        text: for the user.
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
        """Decode what `encode_strings` made.

        Raises:
            WireError: it isn't that.
        """
        try:
            code, phase, sequence, text = decode_strings(body)
            told = cls(int(code), phase, int(sequence), text)
        except ValueError:
            raise WireError("no failure") from None
        if not 0 < told.exit_code < 256:
            raise WireError("no exit code of a failure")
        return told


def clip(text: str) -> str:
    """Return ``text``, or of a long one its beginning and, mostly, its end."""
    text = text.encode("utf-8", "replace").decode()
    if len(text.encode()) <= MOST_BODY - 512:
        return text
    half = MOST_TEXT // 8
    return f"{text[:half]}\n[…]\n{text[-(MOST_TEXT // 2 - half) :]}"
