# SPDX-License-Identifier: Apache-2.0
"""Liveness over real sockets: who is let in, what is seen of whom, and how soon."""

from __future__ import annotations

import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import RetryableError
from dynamo_mpi.common.failure import DetectedBy, Failure, describe_consequences, root_cause
from dynamo_mpi.supervisor import join
from dynamo_mpi.supervisor.frame_connection import FrameConnection
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MAX_BODY,
    NONCE_BYTES,
    TOKEN_BYTES,
    FailureReport,
    Frame,
    FrameDecoder,
    FrameType,
    Join,
    SignalMessage,
    WireError,
    clip,
    rank_mac,
)
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer, RankEvents
from dynamo_mpi.supervisor.join import connect
from dynamo_mpi.supervisor.rendezvous import LOADING_SECONDS, SERVING_SECONDS, Rendezvous

pytestmark = pytest.mark.slow

PROMPT = 5.0
SIZE = 4


class WatchedServer:
    """A heartbeat server, and what it has seen."""

    def __init__(self, timeout: float | None = None) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.rendezvous = Rendezvous("n0", "127.0.0.1", port, secrets.token_hex(TOKEN_BYTES), timeout)
        self.seen: queue.SimpleQueue[Failure] = queue.SimpleQueue()
        self.signals: queue.SimpleQueue[tuple[int, SignalMessage]] = queue.SimpleQueue()
        self.server = HeartbeatServer(
            SIZE,
            self.rendezvous,
            listener,
            lambda: "serve",
            lambda rank: f"n{rank}",
            RankEvents(self.seen.put, lambda *news: self.signals.put(news)),
        )
        self.server.start()
        self._lines: list[FrameConnection] = []

    def join(self, rank: int) -> FrameConnection:
        line, _ = connect(self.rendezvous, rank)
        self._lines.append(line)  # an unreferenced one is closed
        return line

    def next(self) -> Failure:
        return self.seen.get(timeout=PROMPT)

    def stranger(self) -> socket.socket:
        return socket.create_connection((self.rendezvous.address, self.rendezvous.port), timeout=PROMPT)


@pytest.fixture
def watched() -> Iterator[WatchedServer]:
    made = WatchedServer()
    yield made
    made.server.close()


def is_shut(connection: socket.socket) -> bool:
    """Read to the end of a connection; raises TimeoutError where there is none."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    return True


def test_a_closed_connection_is_a_death_within_a_tenth_of_a_second(watched: WatchedServer) -> None:
    line = watched.join(2)
    line.send(Frame(FrameType.PHASE, b"serve"))
    time.sleep(0.05)
    begin = time.monotonic()
    line.close()
    failure = watched.next()
    assert failure.at - begin < 0.1
    assert (failure.rank, failure.cause, failure.phase) == (2, DetectedBy.DISCONNECT, "serve")
    assert "dmesg on n2" in failure.text


def test_who_leaves_in_order_is_not_dead(watched: WatchedServer) -> None:
    leaver, dying = watched.join(1), watched.join(2)
    leaver.send(Frame(FrameType.GOODBYE))
    leaver.close()
    dying.close()
    assert watched.next().rank == 2
    assert watched.seen.empty()


def test_a_failure_is_reported_once_with_all_that_is_known(watched: WatchedServer) -> None:
    line = watched.join(3)
    line.send(Frame(FrameType.FAILED, FailureReport(66, "load", 1, "no weights").pack()))
    line.close()
    failure = watched.next()
    assert (failure.rank, failure.exit_code, failure.text) == (3, 66, "no weights")
    assert (failure.cause, failure.phase, failure.sequence) == (DetectedBy.REPORT, "load", 1)
    watched.join(1).close()
    assert watched.next().rank == 1, "its own end is no news"


def test_who_comes_when_the_end_has_begun_hears_of_it_too(watched: WatchedServer) -> None:
    first = watched.join(1)
    ending = threading.Thread(target=watched.server.announce_abort, args=(70,))
    ending.start()
    assert Frame(FrameType.ABORTING, bytes([70])) in received(first)
    late, early = connect(watched.rendezvous, 2)
    assert Frame(FrameType.ABORTING, bytes([70])) in (early or received(late))
    late.close()
    ending.join()


def received(line: FrameConnection) -> list[Frame]:
    """Return the frames that come next, but for heartbeats."""
    end = time.monotonic() + PROMPT
    while time.monotonic() < end:
        if frames := [frame for frame in line.read() if frame.kind is not FrameType.HEARTBEAT]:
            return frames
        time.sleep(0.01)
    raise AssertionError("nothing came")


def test_silence_is_seen_and_heartbeats_are_heard() -> None:
    watched = WatchedServer(timeout=0.6)
    lines = {rank: watched.join(rank) for rank in (1, 2, 3)}
    silent_since = time.monotonic()
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.1):
            for rank in (1, 3):
                lines[rank].send(Frame(FrameType.HEARTBEAT))

    thread = threading.Thread(target=beat)
    thread.start()
    failure = watched.next()
    end.set()
    thread.join()
    assert (failure.rank, failure.cause, failure.exit_code) == (2, DetectedBy.HEARTBEAT, 124)
    assert 0.5 < failure.at - silent_since < 2
    watched.server.close()


def test_a_signal_of_a_rank_is_passed_on_and_only_such_a_one(watched: WatchedServer) -> None:
    line = watched.join(2)
    line.send(Frame(FrameType.SIGNAL, SignalMessage(signal.SIGTERM, repeated=False).pack()))
    assert watched.signals.get(timeout=PROMPT) == (2, SignalMessage(signal.SIGTERM, repeated=False))
    line.send(Frame(FrameType.SIGNAL, bytes([signal.SIGKILL, 0])))
    failure = watched.next()
    assert (failure.rank, failure.cause) == (2, DetectedBy.DISCONNECT), "what no rank of ours would say"


@pytest.mark.parametrize("body", [b"", b"\x0f", b"\x0f\x02", b"\x09\x00", b"\x0f\x00\x00"])
def test_other_signals_are_none(body: bytes) -> None:
    with pytest.raises(WireError):
        SignalMessage.unpack(body)


def test_a_rank_that_never_connects_is_reported_with_the_address() -> None:
    watched = WatchedServer(timeout=0.4)
    failure = watched.next()
    assert (failure.rank, failure.exit_code) == (1, 75)
    assert "--liveness-network" in failure.text
    watched.server.close()


def test_stacks_come_from_those_who_answer(watched: WatchedServer) -> None:
    line = watched.join(1)
    watched.join(2)

    def answer() -> None:
        while not any(frame.kind is FrameType.STACKS_REQUEST for frame in line.read()):
            time.sleep(0.01)
        line.send(Frame(FrameType.STACKS, b"in barrier"))

    thread = threading.Thread(target=answer)
    thread.start()
    stacks = watched.server.stacks()
    thread.join()
    assert stacks.keys() == {0, 1}
    assert stacks[1] == "in barrier"


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\0" * 64,
        Frame(FrameType.HEARTBEAT).pack(),
        Frame(FrameType.JOIN, b"").pack(),
        Frame(FrameType.JOIN, Join(1, bytes(NONCE_BYTES), bytes(32)).pack()).pack(),
        Frame(FrameType.JOIN, bytes(65)).pack(),
        Frame(FrameType.FAILED, FailureReport(70, "load", 1, "ha").pack()).pack(),
    ],
)
def test_strangers_are_shown_the_door(watched: WatchedServer, said: bytes) -> None:
    with watched.stranger() as stranger:
        stranger.sendall(said)
        assert is_shut(stranger)
    watched.join(1)
    assert watched.seen.empty()


def test_a_proof_is_worth_nothing_on_another_connection(watched: WatchedServer) -> None:
    token = bytes.fromhex(watched.rendezvous.token)
    with watched.stranger() as first, watched.stranger() as second:
        hellos = [next(FrameDecoder().feed(connection.recv(4096))).body for connection in (first, second)]
        nonce = bytes(NONCE_BYTES)
        second.sendall(Frame(FrameType.JOIN, Join(1, nonce, rank_mac(token, hellos[0], 1, nonce)).pack()).pack())
        assert is_shut(second)


def test_a_rank_comes_once(watched: WatchedServer) -> None:
    watched.join(1)
    token, nonce = bytes.fromhex(watched.rendezvous.token), bytes(NONCE_BYTES)
    for rank in (1, 0, SIZE):
        with watched.stranger() as again:
            hello = next(FrameDecoder().feed(again.recv(4096))).body
            again.sendall(Frame(FrameType.JOIN, Join(rank, nonce, rank_mac(token, hello, rank, nonce)).pack()).pack())
            assert is_shut(again)
    assert watched.seen.empty()


def test_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_HANDSHAKE_SECONDS", 0.2)
    watched = WatchedServer(timeout=2)
    with watched.stranger() as stranger:
        stranger.recv(4096)
        assert is_shut(stranger)
    watched.server.close()


def test_ranks_join_while_idle_connections_fill_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "MAX_PENDING", 4)
    watched = WatchedServer(timeout=4)
    crowd = [watched.stranger() for _ in range(SIZE + 4)]
    for stranger in crowd:
        stranger.recv(4096)
    watched.join(1)
    assert is_shut(crowd[0])  # the oldest made room
    for stranger in crowd:
        stranger.close()
    watched.server.close()


def test_the_listener_is_closed_once_all_ranks_have_joined() -> None:
    watched = WatchedServer(timeout=4)
    with watched.stranger() as early:
        lines = [watched.join(rank) for rank in range(1, SIZE)]
        assert is_shut(early)
        with pytest.raises(ConnectionRefusedError):
            watched.stranger()
    for line in lines:
        line.close()
    watched.server.close()


def test_a_listener_that_does_not_know_the_token_is_not_rank_0() -> None:
    watched = WatchedServer()
    with pytest.raises(RetryableError, match="can't be reached at 127") as caught:
        connect(watched.rendezvous._replace(token=secrets.token_hex(TOKEN_BYTES)), 1, 0.5)
    assert "--liveness-network" in caught.value.fix
    watched.server.close()


def test_rank_0_says_that_it_leaves() -> None:
    watched = WatchedServer()
    line = watched.join(1)
    watched.server.close()
    kinds = []
    while FrameType.GOODBYE not in kinds:
        kinds += [frame.kind for frame in line.read()]
    assert watched.seen.empty()


def test_loading_may_be_silent_for_longer_unless_the_user_says_otherwise() -> None:
    rendezvous = Rendezvous("n0")
    assert (rendezvous.heartbeat_timeout_for("load"), rendezvous.heartbeat_timeout_for("serve")) == (
        LOADING_SECONDS,
        SERVING_SECONDS,
    )
    assert rendezvous._replace(heartbeat_timeout=2.0).heartbeat_timeout_for("load") == 2.0
    assert rendezvous._replace(heartbeat_timeout=0.0).heartbeat_timeout_for("serve") is None
    unpacked, rest = Rendezvous.unpack(rendezvous._replace(heartbeat_timeout=0.0, failure_dir="/f").pack(b"rest"))
    assert (unpacked.heartbeat_timeout, unpacked.failure_dir, rest) == (0.0, "/f", b"rest")
    assert Rendezvous.unpack(rendezvous.pack(b""))[0] == rendezvous


@given(
    frames=st.lists(st.builds(Frame, st.sampled_from(FrameType), st.binary(max_size=64)), max_size=6),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(frame.pack() for frame in frames)
    inbox, at = FrameDecoder(), 0
    got: list[Frame] = []
    for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        got += inbox.feed(data[at:end])
        at = end
    assert got == frames


@given(st.binary(max_size=200))
def test_nonsense_is_refused_or_waited_for(data: bytes) -> None:
    inbox = FrameDecoder()
    try:
        for frame in inbox.feed(data):
            FailureReport.unpack(frame.body)
    except WireError:
        return


def test_a_long_traceback_keeps_its_end_and_fits() -> None:
    unpacked = FailureReport(70, "load", 1, "é" * MAX_BODY + "the end").pack()
    assert len(unpacked) <= MAX_BODY
    assert FailureReport.unpack(unpacked).text.endswith("the end")
    assert clip("short") == "short"


def failure(rank: int, text: str, cause: DetectedBy, at: float) -> Failure:
    return Failure(rank, 70, text, cause, "serve", at)


def test_what_a_death_brings_with_it_is_no_first_cause() -> None:
    death = failure(3, "died", DetectedBy.DISCONNECT, 1.0)
    signal = failure(0, "stopped by SIGTERM", DetectedBy.SIGNAL, 0.9)
    echo = failure(
        1, "Traceback (most recent call last):\nConnectionResetError: Connection reset by peer", DetectedBy.REPORT, 0.95
    )
    own = failure(1, "Traceback (most recent call last):\nMemoryError: no", DetectedBy.REPORT, 0.95)
    assert root_cause([signal, death]) is death
    assert root_cause([echo, death]) is death
    assert root_cause([own, death]) is own
    assert root_cause([echo]) is echo
    assert root_cause([signal]) is signal


def test_consequences_take_a_line_for_each_kind() -> None:
    first = failure(3, "died", DetectedBy.DISCONNECT, 1.0)
    rest = [failure(rank, "died: gone\n  expected: x", DetectedBy.DISCONNECT, 1.25) for rank in (1, 2)]
    rest.append(failure(4, "Traceback (most recent call last):\nMemoryError: no", DetectedBy.REPORT, 1.5))
    text = describe_consequences(first, [first, *rest], lambda ranks: f"ranks {list(ranks)}")
    assert text.splitlines() == [
        "  what followed from it:",
        "    ranks [1, 2], 0.25 s later: died: gone",
        "    ranks [4], 0.50 s later: MemoryError: no",
    ]
    assert describe_consequences(first, [first], str) == ""
