# SPDX-License-Identifier: Apache-2.0
"""What rank 0 has all ranks do about KV from or for another worker, and its form as plain integers on the wire. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynamo_mpi.engines.reference.kv_wire import SECRET_BYTES, TRANSFER_ID_BYTES
from dynamo_mpi.engines.reference.step_plan import Int64Array

_WORD = 8


@dataclass(frozen=True)
class Keep:
    """Prefill: copy the first ``tokens`` positions of ``slot``, for whoever knows ``secret`` to fetch."""

    slot: int
    tokens: int
    transfer_id: bytes
    secret: bytes


@dataclass(frozen=True)
class Drop:
    """Prefill: forget what was just kept."""

    transfer_id: bytes


@dataclass(frozen=True)
class Pull:
    """Decode: begin to fetch, in the background, what this rank needs of an offer (JSON); it is for ``slot`` later."""

    number: int
    slot: int
    offer: bytes


@dataclass(frozen=True)
class Poll:
    """Decode: agree how these pulls stand; those that all ranks have are put into their slots."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Abandon:
    """Decode: nobody waits for this pull any more."""

    number: int


Order = Keep | Drop | Pull | Poll | Abandon
_KINDS: dict[type[Order], int] = {Keep: 1, Drop: 2, Pull: 3, Poll: 4, Abandon: 5}


def encode_order(order: Order) -> Int64Array:
    """Return the order as int64: its kind, then its fields; bytes are padded with zeros to whole words."""
    words = np.array([_KINDS[type(order)], *_numbers(order)], np.int64)
    return np.concatenate([words, _to_words(_tail(order))])


def decode_order(words: Int64Array) -> Order:
    """Return the order that ``encode_order`` made ``words`` of.

    Raises:
        ValueError: ``words`` are no order.
    """
    kind, *numbers = words[:4].tolist()
    if kind == _KINDS[Keep]:
        tail = _to_bytes(words[3:], TRANSFER_ID_BYTES + SECRET_BYTES)
        return Keep(numbers[0], numbers[1], tail[:TRANSFER_ID_BYTES], tail[TRANSFER_ID_BYTES:])
    if kind == _KINDS[Drop]:
        return Drop(_to_bytes(words[1:], TRANSFER_ID_BYTES))
    if kind == _KINDS[Pull]:
        return Pull(numbers[0], numbers[1], _to_bytes(words[4:], numbers[2]))
    if kind == _KINDS[Poll]:
        return Poll(tuple(words[1:].tolist()))
    if kind == _KINDS[Abandon]:
        return Abandon(numbers[0])
    raise ValueError(f"there is no order of kind {kind}")


def _numbers(order: Order) -> tuple[int, ...]:
    if isinstance(order, Keep):
        return order.slot, order.tokens
    if isinstance(order, Pull):
        return order.number, order.slot, len(order.offer)
    if isinstance(order, Poll):
        return order.numbers
    return (order.number,) if isinstance(order, Abandon) else ()


def _tail(order: Order) -> bytes:
    if isinstance(order, Keep):
        return order.transfer_id + order.secret
    if isinstance(order, Drop):
        return order.transfer_id
    return order.offer if isinstance(order, Pull) else b""


def _to_words(data: bytes) -> Int64Array:
    return np.frombuffer(data + bytes(-len(data) % _WORD), np.int64)


def _to_bytes(words: Int64Array, size: int) -> bytes:
    data = words.tobytes()
    if not size <= len(data) < size + _WORD:
        raise ValueError(f"an order has {len(data)} bytes for {size}")
    return data[:size]
