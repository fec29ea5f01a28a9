# SPDX-License-Identifier: Apache-2.0
"""The client of KV transfer over TCP: a decode rank fetches the KV of a prompt from prefill ranks, and releases it;
and a pull of one prompt's KV in a thread of its own."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dynamo_mpi.engines.reference.attention import KeyValueCache
from dynamo_mpi.engines.reference.kv_descriptor import KvDescriptor, KvShard, RankShard, ShardSlice, slices_of
from dynamo_mpi.engines.reference.kv_wire import (
    FLOAT32,
    Deadline,
    Fetch,
    FrameSocket,
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

Result = TypeVar("Result")
_RETRY_SECONDS = 0.05


_MOST_PLAUSIBLE = 1e6
"""The largest allowed number: larger keys could overflow, and NaN would spread to other requests through masked slots."""


class FetchError(Exception):
    """KV could not be fetched; the text has the rank and the reason."""


class DisplacedError(FetchError):
    """The server closed the connection before it answered: others displaced it. Worth another attempt."""


def fetch(descriptor: KvDescriptor, part: ShardSlice, deadline: Deadline) -> Float32Array:
    """Return one part, ``[2, layers, heads, tokens, head_dim]``, keys first.

    Raises:
        FetchError: the peer is gone or slow, refuses, or sends invalid data.
    """
    return _until_admitted(lambda: _fetch_once(descriptor, part, deadline), deadline)


def _fetch_once(descriptor: KvDescriptor, part: ShardSlice, deadline: Deadline) -> Float32Array:
    with _conversation(descriptor, part.rank, deadline) as talk:
        talk.send(Fetch(descriptor.transfer_id, part.layers, part.heads))
        shape = (2, len(part.layers), len(part.heads), descriptor.prompt_tokens, descriptor.layout.head_dim)
        shard = talk.receive()
        _check_shape(shard, descriptor, part)
        values = np.empty(shape, "<f4")
        try:
            checksum = talk.peer.receive_payload(memoryview(values.data).cast("B"))
        except ConnectionError:  # no stranger can have displaced it any more
            raise WireError("the peer closed the connection during the transfer") from None
        if checksum != shard.checksum:
            raise WireError("the received KV is damaged: its checksum is wrong")
        # minimum and maximum are NaN if one number is, and comparisons with NaN are false
        if not (values.max() <= _MOST_PLAUSIBLE and values.min() >= -_MOST_PLAUSIBLE):
            raise WireError("the received KV contains numbers that are too large or NaN")
        return values.astype(np.float32, copy=False)


def release(descriptor: KvDescriptor, deadline: Deadline) -> list[str]:
    """Release a transfer at all prefill ranks, after which it can't be fetched any more.

    Returns:
        The errors; ranks with errors keep the KV until it expires.
    """
    failures = []
    for rank in range(len(descriptor.ranks)):
        try:
            _until_admitted(functools.partial(_release_once, descriptor, rank, deadline), deadline)
        except FetchError as error:
            failures.append(str(error))
    return failures


def _release_once(descriptor: KvDescriptor, rank: int, deadline: Deadline) -> None:
    with _conversation(descriptor, rank, deadline) as talk:
        talk.send(Release(descriptor.transfer_id))
        answer = talk.peer.receive()
        if not isinstance(answer, Released):
            raise WireError(answer.reason if isinstance(answer, Refused) else "the answer belongs to another request")


def _until_admitted(attempt: Callable[[], Result], deadline: Deadline) -> Result:
    """Call ``attempt`` until it isn't displaced any more, or the deadline has passed."""
    displaced: DisplacedError | None = None
    while True:
        try:
            return attempt()
        except DisplacedError as error:
            displaced = error
        except FetchError:
            if displaced is not None and time.monotonic() >= deadline.moment:
                raise displaced from None
            raise
        time.sleep(_RETRY_SECONDS)


@dataclass(frozen=True)
class _Conversation:
    """A client of one prefill rank for one transfer."""

    peer: FrameSocket
    secret: bytes
    nonce: bytes

    def send(self, message: Fetch | Release) -> None:
        self.peer.send(sign(message, self.secret, self.nonce))

    def receive(self) -> Shard:
        """Return the peer's answer, which must be a signed shard."""
        answer = self.peer.receive()
        if isinstance(answer, Refused):
            raise WireError(f"refused: {answer.reason}")
        if not isinstance(answer, Shard) or not is_signed(answer, self.secret, self.nonce):
            raise WireError("the peer doesn't know the secret of this transfer")
        return answer


@contextlib.contextmanager
def _conversation(descriptor: KvDescriptor, rank: int, deadline: Deadline) -> Iterator[_Conversation]:
    there = descriptor.ranks[rank]
    try:
        with socket.create_connection((there.host, there.port), timeout=deadline.left()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = FrameSocket(connection, deadline)
            hello = peer.receive()
            if not isinstance(hello, Hello):
                raise WireError("the peer is not a KV server")
            yield _Conversation(peer, descriptor.secret, hello.nonce)
    except (OSError, WireError, MemoryError) as error:
        was_displaced = isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)
        raise (DisplacedError if was_displaced else FetchError)(
            f"prefill rank {rank} at {_place(there)}: {error or type(error).__name__}"
        ) from None


def _check_shape(shard: Shard, descriptor: KvDescriptor, part: ShardSlice) -> None:
    tokens, head_dim = descriptor.prompt_tokens, descriptor.layout.head_dim
    size = 2 * len(part.layers) * len(part.heads) * tokens * head_dim * 4
    expected = (part.layers, part.heads, tokens, head_dim, FLOAT32, size)
    if (shard.layers, shard.heads, shard.tokens, shard.head_dim, shard.dtype, shard.size) != expected:
        raise WireError("the peer offers another shard than the requested one")


def _place(there: RankShard) -> str:
    return f"[{there.host}]:{there.port}" if ":" in there.host else f"{there.host}:{there.port}"


FAILED, PENDING, DONE = 0, 1, 2
"""The status of a pull; the engine uses the lowest of all ranks."""

_GRACE_SECONDS = 1.0


class BackgroundPull:
    """One rank's pull of one prompt's KV. Starts when it is created. Errors set its status and are not raised.

    Args:
        descriptor: the KV's descriptor.
        need: this rank's shard.
        rank: this rank's number.
        seconds: the time limit.
    """

    def __init__(self, descriptor: KvDescriptor, need: KvShard, rank: int, seconds: float) -> None:
        self._descriptor = descriptor
        self._need = need
        self._deadline = Deadline.after(seconds)
        self._seconds = seconds
        self._abandoned = threading.Event()
        self._fetched: Sequence[tuple[ShardSlice, Float32Array]] | None = None
        self._failure = ""
        thread = threading.Thread(target=self._run, args=(rank,), name="kv-pull", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # thread limit reached
            self._failure = str(error)

    def status(self) -> int:
        """Return FAILED, PENDING or DONE."""
        if self._failure:
            return FAILED
        if self._fetched is not None:
            return DONE
        if time.monotonic() > self._deadline.moment + _GRACE_SECONDS:
            self._failure = f"no answer within {self._seconds:g} s"
            return FAILED
        return PENDING

    @property
    def failure(self) -> str:
        """The error if it failed; otherwise empty."""
        return self._failure

    def put_into(self, cache: KeyValueCache, slot: int) -> None:
        """Write the fetched KV to the slot's first positions; only if the status is DONE."""
        for part, values in self._fetched or ():
            layers = _within(part.layers, self._need.layers)
            heads = _within(part.heads, self._need.heads)
            tokens = values.shape[3]
            cache.keys[slot, layers, heads, :tokens] = values[0]
            cache.values[slot, layers, heads, :tokens] = values[1]

    def abandon(self) -> None:
        """Stop fetching; a request in progress ends by its deadline and is dropped."""
        self._abandoned.set()

    def _run(self, rank: int) -> None:
        try:
            fetched = []
            for part in slices_of(self._need, [there.shard for there in self._descriptor.ranks], rank):
                if self._abandoned.is_set():
                    return
                fetched.append((part, fetch(self._descriptor, part, self._deadline)))
            self._fetched = fetched
        except (FetchError, ValueError) as error:
            self._failure = str(error) or type(error).__name__
        except Exception as error:  # any error fails this request only
            self._failure = f"{type(error).__name__}: {error}"


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
