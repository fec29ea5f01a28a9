# SPDX-License-Identifier: Apache-2.0
"""The KV probe between real stations on loopback: what peers that die, stop, lie or never come do to it, within its time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.control_plane.records import WorkerRecord
from dynamo_mpi.engines.reference.kv_wire import Deadline
from dynamo_mpi.probe import kv_lead
from dynamo_mpi.probe.kv_answer import FAILED, LARGE_BYTES, LATE, OK, Between
from dynamo_mpi.probe.kv_child import Ready, StationChild
from dynamo_mpi.probe.kv_lead import lead_kv
from dynamo_mpi.probe.kv_rules import check_kv
from dynamo_mpi.probe.kv_terms import KvTerms, Offer, Station
from dynamo_mpi.probe.kv_wire import FETCH, ORDER, TalkError, access_of, talk_to, welcome
from tests.unit.kv_hosts import needs_nixl, needs_ucx
from tests.unit.worlds import world

pytestmark = pytest.mark.slow

TOKENS = {"prefill": "ab" * 32, "decode": "cd" * 32}
RUN = b"r" * 16


class Place(NamedTuple):
    host: str


class Side:
    """One world's stations, on this host."""

    def __init__(self, role: str, ranks: int, spoilt: int | None = None, seconds: float = 60, **environ: str) -> None:
        self.role, self.ranks = role, ranks
        self.terms = KvTerms(role, seconds, TOKENS[role], "127.0.0.1")
        self.environ = {**os.environ, **environ}
        self.children = [StationChild(self.terms, rank, self.environ, spoilt=rank == spoilt) for rank in range(ranks)]
        self.ready = [child.ready(20) for child in self.children]
        self.told: list[Any] = []
        self.ended = threading.Event()
        self.heard = threading.Event()

    def listen(self) -> None:
        """Have rank 0 hear what it is told."""

        def hear(content: Any) -> None:
            self.told.append(content)
            self.heard.set()

        self.children[0].keep(hear, self.ended.set)

    def record(self, **changes: Any) -> WorkerRecord:
        contract = {"tp_size": self.ranks, "num_layers": 4, "kv_heads": 3}
        return world(self.role, contract, **{"phase": "load", "probe_kv": self.offer().as_json(), **changes})

    def offer(self, transport: str = "tcp") -> Offer:
        stations = tuple(Station(f"{self.role[0]}{n}", one.address, one.port) for n, one in enumerate(self.ready))
        able = tuple(name for name in ("nixl", "ucx") if all(name in one.able for one in self.ready))
        return Offer(self.terms.token, transport, able, stations)

    def pid(self, rank: int) -> int:
        return self.children[rank]._process.pid

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child._process.pid, signal.SIGCONT)
            child.close()


@pytest.fixture
def side() -> Iterator[Callable[..., Side]]:
    """Start a world's stations; they are ended."""
    sides: list[Side] = []

    def begin(role: str, ranks: int, **more: Any) -> Side:
        sides.append(Side(role, ranks, **more))
        return sides[-1]

    yield begin
    for one in sides:
        one.close()


class Registry:
    """etcd's part: the own record with what it offers, and partners."""

    def __init__(self, own: WorkerRecord, *peers: WorkerRecord) -> None:
        self.own, self.peers = own, peers

    def offer_kv(self, offer: dict[str, Any]) -> tuple[WorkerRecord, list[WorkerRecord]]:
        self.own = replace(self.own, probe_kv=offer)
        return self.own, list(self.peers)


def probe(own: Side, *peers: WorkerRecord, transport: str = "tcp", seconds: float = 20) -> list[Between]:
    """Do what rank 0 of the second world does."""
    ranks = [Place(f"{own.role[0]}{rank}") for rank in range(own.ranks)]
    registry = Registry(own.record(phase="probe", probe_kv=None), *peers)
    answers = [one.pack() for one in own.ready]
    end = time.monotonic() + seconds
    told = lead_kv(answers, ranks, own.terms, transport, registry, end)
    return [Between.read(json.loads(answer)) for (answer,) in told]


def states(told: Between) -> dict[tuple[int, int], str]:
    return {(pair.decode, pair.prefill): pull.state for pair, pull in told.pulls}


@pytest.mark.parametrize("second", ["prefill", "decode"])
def test_decode_pulls_whoever_comes_second_and_the_first_is_told(second: str, side: Callable[..., Side]) -> None:
    sides = {"prefill": side("prefill", 3), "decode": side("decode", 1)}
    own, first = sides.pop(second), next(iter(sides.values()))
    first.listen()
    (told,) = probe(own, first.record())
    assert states(told) == {(0, 0): OK, (0, 1): OK, (0, 2): OK}
    for _, pull in told.pulls:
        assert not pull.wrong
        assert (pull.ways, pull.size, pull.transport) == (("tcp/lo",), LARGE_BYTES, "tcp")
        assert 0 < pull.seconds < 1
    assert {finding.rule for finding in check_kv(told)} <= {"T3"}, "on a busy host one may well be slow"
    assert first.heard.wait(5)
    mirrored = Between.read(first.told[0])
    assert (mirrored.role, mirrored.pulls) == (first.role, told.pulls)


def test_wrong_bytes_are_seen_from_the_rank_that_sends_them(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 3, spoilt=1), side("decode", 1)
    (told,) = probe(decode, prefill.record())
    assert [pair.prefill for pair, pull in told.pulls if pull.wrong] == [1]
    assert check_kv(told)[0].rule == "T1"


def test_peers_that_stop_or_die_cost_their_own_pairs_and_bounded_time(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_lead, "_PULL_SECONDS", 1.0)
    prefill, decode = side("prefill", 3), side("decode", 1)
    os.kill(prefill.pid(0), signal.SIGSTOP)
    prefill.children[2].close()
    began = time.monotonic()
    (told,) = probe(decode, prefill.record())
    assert time.monotonic() - began < 8
    assert states(told) == {(0, 0): LATE, (0, 1): OK, (0, 2): FAILED}
    (finding,) = check_kv(told)
    assert finding.rule == "T2"
    assert "prefill rank 0 on p0 (127.0.0.1): not done in 1 s" in finding.found
    assert "prefill rank 2 on p2 (127.0.0.1): [Errno 111] Connection refused" in finding.found
    assert "rank 1" not in finding.found


def test_a_decode_rank_that_stops_is_named_and_the_others_go_on(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_lead, "_PULL_SECONDS", 1.0)
    monkeypatch.setattr(kv_lead, "_GRACE_SECONDS", 0.5)
    prefill, decode = side("prefill", 1), side("decode", 3)
    os.kill(decode.pid(1), signal.SIGSTOP)
    (told,) = probe(prefill, decode.record(), seconds=4)
    assert states(told) == {(0, 0): OK, (1, 0): LATE, (2, 0): OK}
    assert told.pulls[1][1].text == "decode rank 1 on d1 (127.0.0.1): no answer in time"


Serve = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serve_once() -> Iterator[Serve]:
    """Listen, do to each who comes what the function does, and return the port; until the test's end."""
    with contextlib.ExitStack() as listeners:

        def serve(answer: Callable[[socket.socket], None]) -> int:
            listener = listeners.enter_context(socket.create_server(("127.0.0.1", 0)))

            def run() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        with connection, contextlib.suppress(OSError):
                            answer(connection)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            listeners.callback(thread.join, 10)
            # closing it alone would leave the thread in accept()
            listeners.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield serve


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 400, "more than 1048576"),
        (b"n" * 16 + b"\0\0\0\2" + b"m" * 32 + b"{}", "doesn't know this world's token"),
        (b"n" * 5, "closed the connection"),
    ],
)
def test_whoever_listens_there_instead_is_not_believed(
    words: bytes, reason: str, side: Callable[..., Side], serve_once: Serve
) -> None:
    """A decode rank's port, which somebody else has by now."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass

    prefill, decode = side("prefill", 1), side("decode", 1)
    decode.ready[0] = decode.ready[0]._replace(port=serve_once(answer))
    (told,) = probe(prefill, decode.record(), seconds=6)
    ((_, pull),) = told.pulls
    assert pull.state == FAILED
    assert reason in pull.text


@pytest.mark.parametrize(
    ("transport", "answer", "reason"),
    [
        ("tcp", None, "it closed the connection"),
        pytest.param("ucx", {"refused": "UCX: no"}, "it refuses: UCX: no", marks=needs_ucx),
        pytest.param("ucx", {"address": "there"}, "something else than it should", marks=needs_ucx),
        pytest.param("ucx", {"address": 1, "agent": "?"}, "something else than it should", marks=needs_ucx),
        pytest.param("ucx", {"address": 1, "agent": "AAA="}, "description of itself is none", marks=needs_ucx),
        # what UCX makes of that is UCX's: an error, or the end of the station
        pytest.param("ucx", {"address": 1, "agent": "AAAABHh4eHhrZXk="}, "", marks=needs_ucx),
    ],
)
def test_a_prefill_rank_that_knows_the_token_and_lies_is_found_out(
    transport: str, answer: dict[str, Any] | None, reason: str, side: Callable[..., Side], serve_once: Serve
) -> None:
    def lie(connection: socket.socket) -> None:
        talk = welcome(connection, TOKENS["prefill"], Deadline.after(5))
        talk.hear()
        if answer is not None:
            talk.say(**answer)
            talk.hear()

    prefill, decode = side("prefill", 1), side("decode", 1)
    prefill.ready[0] = prefill.ready[0]._replace(port=serve_once(lie))
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer(transport).as_json()), seconds=8)
    ((_, pull),) = told.pulls
    assert pull.state == FAILED
    assert reason in pull.text


def test_a_station_answers_nobody_who_does_not_know_the_token(side: Callable[..., Side]) -> None:
    prefill = side("prefill", 1)
    port = prefill.ready[0].port
    wrong = access_of("00" * 32, FETCH, RUN)
    with talk_to("127.0.0.1", port, wrong, Deadline.after(5)) as talk:
        talk.say(send=100)
        with pytest.raises(ConnectionError):
            talk.receive(1)
    # a key for fetching is none for orders
    fetch = access_of(prefill.terms.token, FETCH, RUN)
    with talk_to("127.0.0.1", port, fetch._replace(purpose=ORDER), Deadline.after(5)) as talk:
        talk.say(told={})
        with pytest.raises(ConnectionError):
            talk.hear()
    with talk_to("127.0.0.1", port, access_of(prefill.terms.token, ORDER, RUN), Deadline.after(5)) as talk:
        talk.say(seconds=1)
        with pytest.raises(TalkError, match="a prefill rank doesn't pull"):
            talk.hear()


def test_no_time_is_no_hang_but_is_said(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 3), side("decode", 1)
    (told,) = probe(decode, prefill.record(), seconds=1.0)
    assert (told.pulls, told.skipped) == ((), 3)
    assert [finding.rule for finding in check_kv(told)] == ["T7"]


def test_a_partner_for_which_others_left_no_time_is_not_blamed(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 3), side("decode", 1)
    for left in (0.0, 2.3):
        (told,) = probe(decode, prefill.record(), seconds=left)
        assert (told.pulls, told.skipped) == ((), 3)
        assert [finding.rule for finding in check_kv(told)] == ["T7"]


def test_partners_that_have_gone_keep_nobody_beyond_the_end(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on hosts that are down: who connects is never answered."""
    monkeypatch.setattr(kv_lead, "_OPEN_SECONDS", 0.5)
    prefill, decode = side("prefill", 1), side("decode", 1)
    silent = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    records = []
    for listener in silent:
        decode.ready[0] = decode.ready[0]._replace(port=listener.getsockname()[1])
        records.append(decode.record())
    began = time.monotonic()
    told = probe(prefill, *records, seconds=4)
    assert time.monotonic() - began < 4 + kv_lead._REPORT_SECONDS + 1
    assert told[0].pulls[0][1].state == LATE
    assert told[2].skipped == 1, "no time is left for it"
    for listener in silent:
        listener.close()


@needs_ucx
def test_what_takes_long_to_load_is_loaded_before_a_pull(
    side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As NIXL takes where it imports torch."""
    monkeypatch.setattr(kv_lead, "_PULL_SECONDS", 1.5)
    slow = """
import time
from dynamo_mpi.probe import kv_ucx
begin = kv_ucx.UcxAgent.__init__
def late(agent):
    time.sleep(2)
    begin(agent)
kv_ucx.UcxAgent.__init__ = late
"""
    (tmp_path / "sitecustomize.py").write_text(slow)
    environ = {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))), "UCX_TLS": "tcp"}
    prefill, decode = side("prefill", 2, **environ), side("decode", 1, **environ)
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("ucx").as_json()))
    assert states(told) == {(0, 0): OK, (0, 1): OK}


def test_partners_that_can_not_be_asked(side: Callable[..., Side]) -> None:
    decode = side("decode", 1)
    peer = world("prefill", phase="probe")
    assert probe(decode, peer) == [], "it will ask"
    (told,) = probe(decode, replace(peer, phase="serve"))
    assert "runs without --probe kv" in told.problem
    (told,) = probe(decode, replace(peer, probe_kv={"token": "x"}))
    assert "what its record says can't be used" in told.problem
    few = Offer(TOKENS["prefill"], "tcp", (), (Station("p0", "127.0.0.1", 1),))
    (told,) = probe(decode, replace(peer, probe_kv=few.as_json()))
    assert "fewer ranks than its layout" in told.problem
    one = Offer(TOKENS["prefill"], "tcp", (), (Station("p0", "127.0.0.1", 1),)).as_json()
    for change in ({"trtllm_version": "mine"}, {"tp_size": 0}, {"tp_size": 1 << 40}, {"tp_size": -1, "pp_size": -1}):
        odd = world("prefill", {"tp_size": 1, "num_layers": 4, "kv_heads": 3, **change}, phase="serve", probe_kv=one)
        (told,) = probe(decode, odd)
        assert "what its record says can't be used" in told.problem, change


def test_what_it_can_not_go_over_is_said_and_something_else_taken(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 1), side("decode", 1)
    (told,) = probe(prefill, decode.record(), transport="mooncake")
    ((_, pull),) = told.pulls
    assert (pull.state, pull.transport) == (OK, "tcp")
    assert told.reason == "there is no probe for mooncake"
    prefill.ready = [one._replace(able=()) for one in prefill.ready]
    (told,) = probe(prefill, decode.record(), transport="nixl")
    assert told.pulls[0][1].transport == "tcp"
    assert told.reason == "NIXL's Python package and UCX's library (libucp.so.0) are missing on one side or both"


@needs_ucx
def test_ucx_itself_reads_the_right_bytes_and_says_over_what(side: Callable[..., Side]) -> None:
    tcp = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo,mlx5_7:1"}
    prefill, decode = side("prefill", 3, spoilt=2, **tcp), side("decode", 1, **tcp)
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("ucx").as_json()))
    assert states(told) == {(0, 0): OK, (0, 1): OK, (0, 2): OK}
    assert [pull.wrong for _, pull in told.pulls] == [False, False, True]
    assert {(pull.ways, pull.transport) for _, pull in told.pulls} == {(("tcp/lo",), "ucx")}
    findings = {finding.rule: finding for finding in check_kv(told)}
    assert {"T1", "T5"} <= findings.keys() <= {"T1", "T3", "T5"}, "on a busy host one may well be slow"
    assert findings["T5"].found.startswith("d0: network device 'mlx5_7:1' is not available")


@needs_ucx
def test_ucx_stands_in_where_the_wanted_package_is_missing(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 1), side("decode", 1)
    decode.ready = [one._replace(able=("ucx",)) for one in decode.ready]
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("nixl").as_json()))
    assert (told.pulls[0][1].state, told.pulls[0][1].transport) == (OK, "ucx")
    (finding,) = check_kv(told)
    assert finding.message == "not probed over nixl, but over ucx: NIXL's Python package is missing on one side or both"


@needs_ucx
def test_ucx_does_not_wait_for_a_peer_that_stops(side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_lead, "_PULL_SECONDS", 1.5)
    prefill, decode = side("prefill", 3, UCX_TLS="tcp"), side("decode", 1, UCX_TLS="tcp")
    os.kill(prefill.pid(1), signal.SIGSTOP)
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("ucx").as_json()))
    assert states(told) == {(0, 0): OK, (0, 1): LATE, (0, 2): OK}


def test_a_station_ends_when_its_time_is_over_and_leaves_nothing(side: Callable[..., Side]) -> None:
    decode = side("decode", 1, seconds=0.5)
    decode.listen()
    assert decode.ended.wait(10)
    assert decode.children[0]._process.returncode == 0, "and is reaped"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", decode.ready[0].port), 2)


def test_a_rank_without_such_an_address_says_so(side: Callable[..., Side]) -> None:
    decode = side("decode", 1)
    lost = StationChild(decode.terms._replace(network="203.0.113.0/24"), 0, os.environ)
    ready = lost.ready(20)
    assert "this host has no address by 203.0.113.0/24" in ready.trouble
    assert Ready.unpack(ready.pack()) == ready
    decode.ready = [ready]
    (told,) = probe(decode)
    assert "rank 0 on d0 can't take part: this host has no address" in told.problem


@needs_nixl
def test_nixl_reads_the_right_bytes_and_says_over_what(side: Callable[..., Side]) -> None:
    prefill, decode = side("prefill", 3, spoilt=2), side("decode", 1, UCX_TLS="tcp", UCX_NET_DEVICES="lo,mlx5_7:1")
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("nixl").as_json()))
    assert states(told) == {(0, 0): OK, (0, 1): OK, (0, 2): OK}
    assert [pull.wrong for _, pull in told.pulls] == [False, False, True]
    assert {pull.ways for _, pull in told.pulls} == {("tcp/lo",)}
    findings = {finding.rule: finding for finding in check_kv(told)}
    assert {"T1", "T5"} <= findings.keys() <= {"T1", "T3", "T5"}, "on a busy host one may well be slow"
    assert findings["T5"].found.startswith("d0: network device 'mlx5_7:1' is not available")


@needs_nixl
def test_nixl_does_not_wait_for_a_peer_that_stops(side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_lead, "_PULL_SECONDS", 1.5)
    # over TCP the other side's help is needed
    prefill, decode = side("prefill", 3, UCX_TLS="tcp"), side("decode", 1, UCX_TLS="tcp")
    os.kill(prefill.pid(1), signal.SIGSTOP)
    (told,) = probe(decode, prefill.record(probe_kv=prefill.offer("nixl").as_json()))
    assert states(told)[0, 1] == LATE
    assert states(told)[0, 2] == OK
