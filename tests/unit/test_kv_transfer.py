# SPDX-License-Identifier: Apache-2.0
"""KV over real sockets: it arrives whole or not at all, in time, and only for whom it was offered."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from dynamo_mpi.engines.reference.kv_client import FetchError, fetch, release
from dynamo_mpi.engines.reference.kv_descriptor import (
    CacheLayout,
    KvDescriptor,
    KvShard,
    RankShard,
    ShardSlice,
    digest_of,
)
from dynamo_mpi.engines.reference.kv_server import KvServer, KvStore, StoreFullError
from dynamo_mpi.engines.reference.kv_wire import Deadline, Fetch, FrameSocket, Hello, Refused, Shard, encode, sign
from dynamo_mpi.engines.reference.weights import Float32Array
from tests.unit.kv_hosts import needs_ipv6

HOLDING = KvShard(range(10, 14), range(2, 5))
VALUES = np.random.default_rng(1).standard_normal((2, 4, 3, 6, 8), np.float32)
HALVES = list(VALUES)
OFFER = KvDescriptor(
    transfer_id=b"i" * 16,
    secret=b"s" * 32,
    layout=CacheLayout("m", 20, 6, 8, 32),
    tp_size=1,
    pp_size=1,
    prompt_tokens=6,
    prompt_digest=digest_of(range(6)),
    first_token=1,
    ranks=(RankShard("127.0.0.1", 1, HOLDING),),
)
PIECE = ShardSlice(0, range(11, 13), range(3, 5))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def at(port: int) -> KvDescriptor:
    return replace(OFFER, ranks=(RankShard("127.0.0.1", port, HOLDING),))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> KvStore:
    store = KvStore(most_tokens=20, keep_seconds=60, clock=clock)
    store.keep(OFFER.transfer_id, OFFER.secret, HOLDING, HALVES)
    return store


@pytest.fixture
def server(store: KvStore) -> Iterator[KvServer]:
    server = KvServer(store, "127.0.0.1", connection_seconds=1.0)
    yield server
    server.close()


@contextlib.contextmanager
def peer(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run one conversation as a prefill rank of the test's making; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def get(offer: KvDescriptor, piece: ShardSlice = PIECE) -> Float32Array:
    return fetch(offer, piece, Deadline.after(5))


def server_port(offer: KvDescriptor) -> int:
    return offer.ranks[0].port


def refused(offer: KvDescriptor, piece: ShardSlice = PIECE, seconds: float = 5.0) -> str:
    with pytest.raises(FetchError) as error:
        fetch(offer, piece, Deadline.after(seconds))
    return str(error.value)


def test_a_piece_arrives_as_it_was_kept(server: KvServer) -> None:
    offer = at(server.address[1])

    assert np.array_equal(get(offer), VALUES[:, 1:3, 1:3])
    assert np.array_equal(get(offer, ShardSlice(0, HOLDING.layers, HOLDING.heads)), VALUES)


@needs_ipv6
def test_a_piece_arrives_over_ipv6(store: KvStore) -> None:
    server = KvServer(store, "::1")
    try:
        offer = replace(OFFER, ranks=(RankShard("::1", server.address[1], HOLDING),))
        assert np.array_equal(get(offer), VALUES[:, 1:3, 1:3])
        assert release(offer, Deadline.after(5)) == []
    finally:
        server.close()
    assert f"prefill rank 0 at [::1]:{server_port(offer)}" in refused(offer)


def test_a_released_transfer_is_forgotten(server: KvServer, store: KvStore) -> None:
    offer = at(server.address[1])

    assert release(offer, Deadline.after(5)) == []
    assert len(store) == 0
    assert "no such transfer" in refused(offer)
    assert "no such transfer" in release(offer, Deadline.after(5))[0]


def test_what_is_never_fetched_expires(server: KvServer, store: KvStore, clock: Clock) -> None:
    clock.now += 59
    get(at(server.address[1]))
    clock.now += 2

    assert "expired" in refused(at(server.address[1]))
    assert len(store) == 0


def test_a_wrong_secret_gets_and_releases_nothing(server: KvServer, store: KvStore) -> None:
    wrong = replace(at(server.address[1]), secret=b"x" * 32)

    assert "not yours" in refused(wrong)
    assert "not yours" in release(wrong, Deadline.after(5))[0]
    assert len(store) == 1


def test_more_than_the_rank_holds_is_refused(server: KvServer) -> None:
    assert "holds layers 10 to 13" in refused(at(server.address[1]), ShardSlice(0, range(9, 12), range(2, 3)))


def test_a_full_store_keeps_what_it_has(store: KvStore, clock: Clock) -> None:
    store.keep(b"j" * 16, b"t" * 32, HOLDING, HALVES)
    store.keep(b"k" * 16, b"t" * 32, HOLDING, HALVES)
    with pytest.raises(StoreFullError, match="KV of 3 prompts, 18 tokens"):
        store.keep(b"l" * 16, b"t" * 32, HOLDING, HALVES)
    assert len(store) == 3
    clock.now += 61
    store.keep(b"l" * 16, b"t" * 32, HOLDING, HALVES)
    assert len(store) == 1


def test_a_client_that_stalls_loses_its_connection_and_delays_no_other(server: KvServer) -> None:
    with socket.create_connection(server.address, timeout=5) as idle:
        get(at(server.address[1]))
        began = time.monotonic()
        while idle.recv(1000):
            pass
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("nonsense", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), encode(Hello(bytes(16)))])
def test_nonsense_is_answered_and_the_server_goes_on(server: KvServer, nonsense: bytes) -> None:
    with socket.create_connection(server.address, timeout=5) as client:
        frames = FrameSocket(client, Deadline.after(5))
        assert isinstance(frames.receive(), Hello)
        client.sendall(nonsense)
        assert isinstance(frames.receive(), Refused)
    get(at(server.address[1]))


def test_a_missing_listener_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.monotonic()

    assert f"prefill rank 0 at 127.0.0.1:{port}" in refused(at(port))
    assert time.monotonic() - began < 1


def _say_nothing(connection: socket.socket) -> None:
    connection.settimeout(5)
    connection.recv(1)


def _drip(connection: socket.socket) -> None:
    for byte in encode(Hello(bytes(16))):
        connection.send(bytes([byte]))
        time.sleep(0.1)


@pytest.mark.parametrize("stall", [_say_nothing, _drip])
def test_a_peer_that_stalls_meets_the_deadline(stall: Callable[[socket.socket], None]) -> None:
    began = time.monotonic()
    with peer(stall) as port:
        assert "timed out" in refused(at(port), seconds=0.5)
        assert time.monotonic() - began < 1.5


def _lie(
    change: Callable[[Shard], Shard], payload: bytes, secret: bytes = OFFER.secret, honest: bytes = b""
) -> Callable[..., None]:
    honest = honest or VALUES[:, 1:3, 1:3].tobytes()

    def answer(connection: socket.socket) -> None:
        frames = FrameSocket(connection, Deadline.after(5))
        frames.send(Hello(bytes(16)))
        request = frames.receive()
        assert isinstance(request, Fetch)
        shard = Shard(request.layers, request.heads, 6, 8, 1, len(honest), zlib.crc32(honest))
        frames.send(sign(change(shard), secret, bytes(16)))
        frames.send_payload(memoryview(payload or honest))

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_lie(lambda shard: replace(shard, tokens=5), b""), "another shard"),
        (_lie(lambda shard: replace(shard, heads=range(2, 4)), b""), "another shard"),
        (_lie(lambda shard: replace(shard, size=2**63), b""), "another shard"),
        (_lie(lambda shard: replace(shard, dtype=2), b""), "another shard"),
        (_lie(lambda shard: shard, bytes(1000)), "closed the connection"),
        (_lie(lambda shard: shard, bytes(VALUES[:, 1:3, 1:3].nbytes)), "checksum"),
        (_lie(lambda shard: shard, b"", b"?" * 32), "doesn't know the secret"),
        (
            _lie(lambda shard: shard, b"", honest=np.full(2 * 2 * 2 * 6 * 8, np.nan, "<f4").tobytes()),
            "too large or NaN",
        ),
        (_lie(lambda shard: shard, b"", honest=np.full(2 * 2 * 2 * 6 * 8, 1e30, "<f4").tobytes()), "too large or NaN"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "uses another protocol"),
        (lambda connection: connection.sendall(encode(Refused("no"))), "is not a KV server"),
        (lambda connection: connection.close(), "closed the connection"),
    ],
)
def test_a_peer_that_lies_is_an_error(answer: Callable[[socket.socket], None], words: str) -> None:
    with peer(answer) as port:
        assert words in refused(at(port), seconds=1.0)


def test_idle_connections_do_not_keep_a_decode_rank_out(server: KvServer) -> None:
    crowd = [socket.create_connection(server.address) for _ in range(200)]
    try:
        for _ in range(20):
            get(at(server.address[1]))
    finally:
        for connection in crowd:
            connection.close()
