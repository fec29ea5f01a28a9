# SPDX-License-Identifier: Apache-2.0
"""The KV server of one prefill rank: hands out what its store keeps to whoever knows the transfer's secret.

One thread listens and lets the store forget; each connection has a thread of its own, of which there are only so many, and only so
long. A peer that stalls, lies or says nonsense costs itself its connection.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import zlib

import numpy as np

from dynamo_mpi.engines.reference.kv_shards import Holding, covers
from dynamo_mpi.engines.reference.kv_socket import Deadline, FrameSocket
from dynamo_mpi.engines.reference.kv_store import Kept, KvStore
from dynamo_mpi.engines.reference.kv_wire import (
    FLOAT32,
    NONCE_BYTES,
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

_log = logging.getLogger(__name__)
_MOST_CONNECTIONS = 64
_LOOK_SECONDS = 0.5
_STRANGER_SECONDS = 5.0
_BACKLOG = 128


class KvServer:
    """Serves a store over TCP, from construction until `close`.

    Args:
        store: what is handed out.
        host: address to listen on; the system chooses the port.
        connection_seconds: how long one connection may last from a request of somebody who knows a secret on; strangers get less.

    Raises:
        OSError: the address can't be listened on.
    """

    def __init__(self, store: KvStore, host: str, connection_seconds: float = 30.0) -> None:
        self._store = store
        self._connection_seconds = connection_seconds
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self._listener.settimeout(_LOOK_SECONDS)
        self._closing = threading.Event()
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._thread = threading.Thread(target=self._listen, name="kv-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port it listens on."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Stop listening; connections that are open end by themselves. Idempotent."""
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while not self._closing.is_set():
            self._store.expire()
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # out of descriptors, say: connections that end make room again
                if self._closing.is_set():
                    return
                _log.warning("the KV server can't accept a connection: %s", error)
                self._closing.wait(_LOOK_SECONDS)
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="kv-connection", daemon=True).start()
            except RuntimeError as error:  # no more threads on this host
                _log.warning("the KV server can't serve a connection: %s", error)
                connection.close()
                self._room.release()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer = FrameSocket(connection, Deadline.after(min(_STRANGER_SECONDS, self._connection_seconds)))
                try:
                    self._converse(peer)
                except WireError as error:
                    with contextlib.suppress(OSError):
                        peer.send(Refused(str(error)))
        except OSError as error:
            _log.info("a KV connection ended: %s", error)
        except Exception:  # of one connection: the others go on
            _log.exception("a KV connection failed")
        finally:
            self._room.release()

    def _converse(self, peer: FrameSocket) -> None:
        """Answer requests until the peer closes the connection or is refused something."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        peer.send(Hello(nonce))
        while True:
            try:
                request = peer.receive()
            except ConnectionError:
                return
            if not isinstance(request, (Fetch, Release)):
                raise WireError("this server answers fetch and release")
            kept = self._store.find(request.transfer_id)
            # the same words for both, so that nobody can find out which transfers there are
            if kept is None or not is_signed(request, kept.secret, nonce):
                raise WireError("no such transfer: never offered, expired, released, or not yours")
            peer.deadline = Deadline.after(self._connection_seconds)
            if isinstance(request, Release):
                self._store.release(request.transfer_id)
                peer.send(Released())
            else:
                _send(peer, kept, request, nonce)


def _send(peer: FrameSocket, kept: Kept, request: Fetch, nonce: bytes) -> None:
    payload = memoryview(np.ascontiguousarray(_wanted(kept, request), "<f4").data).cast("B")
    peer.send(sign(_shard(kept, request, zlib.crc32(payload)), kept.secret, nonce))
    peer.send_payload(payload)


def _wanted(kept: Kept, request: Fetch) -> Float32Array:
    mine = kept.holding
    if not (covers(mine.layers, request.layers) and covers(mine.heads, request.heads)):
        raise WireError(f"this rank holds {describe(mine)}")
    first_layer, first_head = mine.layers.start, mine.heads.start
    wanted: Float32Array = kept.values[
        :,
        request.layers.start - first_layer : request.layers.stop - first_layer,
        request.heads.start - first_head : request.heads.stop - first_head,
    ]
    return wanted


def _shard(kept: Kept, request: Fetch, checksum: int) -> Shard:
    tokens, head_dim = kept.values.shape[3:]
    size = 2 * len(request.layers) * len(request.heads) * tokens * head_dim * 4
    return Shard(request.layers, request.heads, tokens, head_dim, FLOAT32, size, checksum)


def describe(holding: Holding) -> str:
    """Say in words what a rank holds."""
    layers, heads = holding.layers, holding.heads
    return f"layers {layers.start} to {layers.stop - 1}, KV heads {heads.start} to {heads.stop - 1}"
