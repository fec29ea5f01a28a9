# SPDX-License-Identifier: Apache-2.0
"""The server of KV transfer over TCP: a prefill rank stores the KV of prompts and serves it to decode ranks, see `kv_client`.

Prefill stores copies, so that a slot of the KV cache is free at once. A copy is removed when decode releases it, or when it expires. A
server thread that is sending it keeps a reference, and stored copies are never modified.

One thread listens and removes expired copies; each connection has a thread of its own; the number of unauthenticated ones and the duration of
all are limited. A peer that stalls or violates the protocol only loses its connection.

Peers are not trusted: a peer must know the transfer's secret, and shape, format, size and checksum must be the requested ones. Memory is
allocated by the size of the *request*, never by what a peer announces.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynamo_mpi.common.admission import Admission, Throttle
from dynamo_mpi.engines.reference.kv_descriptor import KvShard, covers
from dynamo_mpi.engines.reference.kv_wire import (
    FLOAT32,
    NONCE_BYTES,
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


class StoreFullError(Exception):
    """The store is full of KV that has not been fetched."""


@dataclass(frozen=True)
class StoredKv:
    """KV of one prompt on one rank.

    Args:
        secret: the secret that a client must know.
        shard: the layers and heads of the values.
        values: ``[2, layers, heads, tokens, head_dim]``, keys first.
        expires: expiry by the store's clock.
    """

    secret: bytes
    shard: KvShard
    values: Float32Array
    expires: float

    @property
    def tokens(self) -> int:
        count: int = self.values.shape[3]
        return count


class KvStore:
    """Stored KV by transfer id. Thread-safe.

    Args:
        most_tokens: largest number of stored tokens.
        keep_seconds: how long KV is kept if it isn't fetched.
        clock: monotonic seconds.
    """

    def __init__(self, most_tokens: int, keep_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_tokens = most_tokens
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: dict[bytes, StoredKv] = {}

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._stored)

    def keep(self, transfer_id: bytes, secret: bytes, shard: KvShard, halves: Sequence[Float32Array]) -> None:
        """Store a copy. Called by one thread only.

        Args:
            transfer_id: its id.
            secret: the secret that a client must know.
            shard: the layers and heads of the values.
            halves: keys and values, each ``[layers, heads, tokens, head_dim]``.

        Raises:
            StoreFullError: the store is full.
        """
        tokens = halves[0].shape[2]
        with self._lock:
            self._expire()
            waiting = sum(other.tokens for other in self._stored.values())
            if waiting + tokens > self.most_tokens:
                raise StoreFullError(
                    f"the KV of {len(self._stored)} prompts, {waiting} tokens, waits for decode workers; "
                    f"there is room for {self.most_tokens} tokens"
                )
        values = np.stack(halves)
        with self._lock:
            self._stored[transfer_id] = StoredKv(secret, shard, values, self._clock() + self._keep_seconds)

    def find(self, transfer_id: bytes) -> StoredKv | None:
        """Return the KV of ``transfer_id``; None if there is none or it has expired."""
        with self._lock:
            self._expire()
            return self._stored.get(transfer_id)

    def release(self, transfer_id: bytes) -> None:
        """Remove a transfer's KV; unknown ids are ignored."""
        with self._lock:
            self._stored.pop(transfer_id, None)

    def expire(self) -> None:
        """Remove expired KV."""
        with self._lock:
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        for transfer_id in [name for name, stored in self._stored.items() if stored.expires <= now]:
            del self._stored[transfer_id]


_log = logging.getLogger(__name__)
_MOST_STRANGERS = 64
_LOOK_SECONDS = 0.5
_STRANGER_SECONDS = 5.0
_BACKLOG = 128


class KvServer:
    """Serves a store over TCP, from construction until `close`.

    Args:
        store: the stored KV.
        host: address to listen on; the system chooses the port.
        connection_seconds: duration limit of a connection after an authenticated request; 5 s before one.

    Raises:
        OSError: it can't listen at the address.
    """

    def __init__(self, store: KvStore, host: str, connection_seconds: float = 30.0) -> None:
        self.store = store
        self._connection_seconds = connection_seconds
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self._listener.settimeout(_LOOK_SECONDS)
        self._closing = threading.Event()
        self._admission: Admission[socket.socket] = Admission(_MOST_STRANGERS, _STRANGER_SECONDS)
        self._admission_lock = threading.Lock()
        self._accept_warnings = Throttle()
        self._thread = threading.Thread(target=self._listen, name="kv-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """The host and port at which it listens."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Stop listening; open connections end by themselves. Idempotent."""
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while not self._closing.is_set():
            self.store.expire()
            try:
                connection, peer = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # for instance no free descriptors, until connections end
                if self._closing.is_set():
                    return
                if (suppressed := self._accept_warnings.permit(time.monotonic())) is not None:
                    _log.warning("the KV server can't accept a connection: %s (%d times before)", error, suppressed)
                self._closing.wait(_LOOK_SECONDS)
                continue
            with self._admission_lock:
                displaced = self._admission.enter(connection, peer[0], time.monotonic())
            for stranger in displaced:
                with contextlib.suppress(OSError):  # its thread, if it has one, closes it
                    stranger.shutdown(socket.SHUT_RDWR)
            if connection in displaced:
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="kv-connection", daemon=True).start()
            except RuntimeError as error:  # thread limit reached
                _log.warning("the KV server can't serve a connection: %s", error)
                self._leave(connection)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer = FrameSocket(connection, Deadline.after(min(_STRANGER_SECONDS, self._connection_seconds)))
                try:
                    self._converse(connection, peer)
                except WireError as error:
                    with contextlib.suppress(OSError):
                        peer.send(Refused(str(error)))
        except OSError as error:
            _log.info("a KV connection ended: %s", error)
        except Exception:  # an error of one connection must not end the others
            _log.exception("a KV connection failed")
        finally:
            self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        """Count a connection no longer as a stranger's."""
        with self._admission_lock:
            self._admission.leave(connection)

    def _converse(self, connection: socket.socket, peer: FrameSocket) -> None:
        """Answer requests until the peer closes the connection or a request is refused."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        peer.send(Hello(nonce))
        while True:
            try:
                peer.wait_readable()
                with self._admission_lock:
                    self._admission.begin_request(connection, time.monotonic())
                request = peer.receive()
            except ConnectionError:
                return
            if not isinstance(request, (Fetch, Release)):
                raise WireError("this server answers fetch and release")
            stored = self.store.find(request.transfer_id)
            # the same text for all cases, so that a client can't find out which transfers exist
            if stored is None or not is_signed(request, stored.secret, nonce):
                raise WireError("no such transfer: never offered, expired, released, or not yours")
            self._leave(connection)
            peer.deadline = Deadline.after(self._connection_seconds)
            if isinstance(request, Release):
                self.store.release(request.transfer_id)
                peer.send(Released())
            else:
                _send(peer, stored, request, nonce)


def _send(peer: FrameSocket, stored: StoredKv, request: Fetch, nonce: bytes) -> None:
    payload = memoryview(np.ascontiguousarray(_wanted(stored, request), "<f4").data).cast("B")
    peer.send(sign(_shard(stored, request, zlib.crc32(payload)), stored.secret, nonce))
    peer.send_payload(payload)


def _wanted(stored: StoredKv, request: Fetch) -> Float32Array:
    mine = stored.shard
    if not (covers(mine.layers, request.layers) and covers(mine.heads, request.heads)):
        raise WireError(f"this rank holds {_describe(mine)}")
    first_layer, first_head = mine.layers.start, mine.heads.start
    wanted: Float32Array = stored.values[
        :,
        request.layers.start - first_layer : request.layers.stop - first_layer,
        request.heads.start - first_head : request.heads.stop - first_head,
    ]
    return wanted


def _shard(stored: StoredKv, request: Fetch, checksum: int) -> Shard:
    tokens, head_dim = stored.values.shape[3:]
    size = 2 * len(request.layers) * len(request.heads) * tokens * head_dim * 4
    return Shard(request.layers, request.heads, tokens, head_dim, FLOAT32, size, checksum)


def _describe(shard: KvShard) -> str:
    """Describe a rank's shard."""
    layers, heads = shard.layers, shard.heads
    return f"layers {layers.start} to {layers.stop - 1}, KV heads {heads.start} to {heads.stop - 1}"
