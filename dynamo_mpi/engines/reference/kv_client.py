# SPDX-License-Identifier: Apache-2.0
"""How a decode rank fetches keys and values from prefill ranks, and tells them that they may forget.

Nothing that a peer says is taken on trust: it has to know the transfer's secret, and the shape, format, size and checksum have to be those
asked for. Memory is taken by what *we* asked for, never by what a peer announces.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dynamo_mpi.engines.reference.kv_offer import Holder, Offer
from dynamo_mpi.engines.reference.kv_shards import Piece
from dynamo_mpi.engines.reference.kv_socket import Deadline, FrameSocket
from dynamo_mpi.engines.reference.kv_wire import (
    FLOAT32,
    Fetch,
    Hello,
    Refused,
    Release,
    Released,
    Shard,
    WireError,
    is_signed,
    sign,
)
from dynamo_mpi.engines.reference.weights import Float32Array

_MOST_PLAUSIBLE = 1e6
"""Larger keys could overflow, and NaN spreads: attention over a range of slots multiplies by zero what is masked, of all requests."""


class FetchError(Exception):
    """The KV didn't come; the text says from which rank, and why."""


def fetch(offer: Offer, piece: Piece, deadline: Deadline) -> Float32Array:
    """Return one piece, ``[2, layers, heads, tokens, head_dim]``, keys first.

    Raises:
        FetchError: the peer is gone, slow, refuses, or sends something else.
    """
    with _conversation(offer, piece.holder, deadline) as talk:
        talk.say(Fetch(offer.transfer_id, piece.layers, piece.heads))
        shape = (2, len(piece.layers), len(piece.heads), offer.prompt_tokens, offer.layout.head_dim)
        shard = talk.hear()
        _check_shape(shard, offer, piece)
        values = np.empty(shape, "<f4")
        checksum = talk.peer.receive_payload(memoryview(values.data).cast("B"))
        if checksum != shard.checksum:
            raise WireError("what came is damaged: its checksum is wrong")
        # both are NaN where one number is, and no comparison holds for that
        if not (values.max() <= _MOST_PLAUSIBLE and values.min() >= -_MOST_PLAUSIBLE):
            raise WireError("what came holds numbers that no KV cache has")
        return values.astype(np.float32, copy=False)


def release(offer: Offer, deadline: Deadline) -> list[str]:
    """Tell all prefill ranks that nobody fetches this transfer any more.

    Returns:
        What went wrong: those ranks will forget it when its time is over.
    """
    failures = []
    for rank in range(len(offer.holders)):
        try:
            with _conversation(offer, rank, deadline) as talk:
                talk.say(Release(offer.transfer_id))
                answer = talk.peer.receive()
                if not isinstance(answer, Released):
                    raise WireError(answer.reason if isinstance(answer, Refused) else "an answer to something else")
        except FetchError as error:
            failures.append(str(error))
    return failures


@dataclass(frozen=True)
class _Conversation:
    """With one prefill rank, about one transfer."""

    peer: FrameSocket
    secret: bytes
    nonce: bytes

    def say(self, message: Fetch | Release) -> None:
        self.peer.send(sign(message, self.secret, self.nonce))

    def hear(self) -> Shard:
        """Return the peer's answer, which has to be a signed shard."""
        answer = self.peer.receive()
        if isinstance(answer, Refused):
            raise WireError(f"refused: {answer.reason}")
        if not isinstance(answer, Shard) or not is_signed(answer, self.secret, self.nonce):
            raise WireError("the peer doesn't know the secret of this transfer")
        return answer


@contextlib.contextmanager
def _conversation(offer: Offer, rank: int, deadline: Deadline) -> Iterator[_Conversation]:
    holder = offer.holders[rank]
    try:
        with socket.create_connection((holder.host, holder.port), timeout=deadline.left()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = FrameSocket(connection, deadline)
            hello = peer.receive()
            if not isinstance(hello, Hello):
                raise WireError("the peer doesn't begin as a KV server does")
            yield _Conversation(peer, offer.secret, hello.nonce)
    except (OSError, WireError, MemoryError) as error:
        raise FetchError(f"prefill rank {rank} at {_place(holder)}: {error or type(error).__name__}") from None


def _check_shape(shard: Shard, offer: Offer, piece: Piece) -> None:
    tokens, head_dim = offer.prompt_tokens, offer.layout.head_dim
    size = 2 * len(piece.layers) * len(piece.heads) * tokens * head_dim * 4
    expected = (piece.layers, piece.heads, tokens, head_dim, FLOAT32, size)
    if (shard.layers, shard.heads, shard.tokens, shard.head_dim, shard.dtype, shard.size) != expected:
        raise WireError("the peer offers something else than was asked for")


def _place(holder: Holder) -> str:
    return f"[{holder.host}]:{holder.port}" if ":" in holder.host else f"{holder.host}:{holder.port}"
