# SPDX-License-Identifier: Apache-2.0
"""The KV check's rules, its pairs over loopback, and its ranks in threads: what peers that lie, stop or never answer do to it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks import kv, kv_pull
from dynamo_mpi.checks.kv import KvPathCheck, rounds
from dynamo_mpi.checks.kv_pull import (
    FAILED,
    LATE,
    OK,
    NixlAgent,
    NixlError,
    PairResult,
    PatternServer,
    Source,
    paths_in,
    pattern,
    run_pair,
)
from dynamo_mpi.checks.kv_rules import check_coverage, check_kv, slow_pairs, summary
from dynamo_mpi.checks.kv_settings import KvCheckSettings, find_host, read_settings
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.deploy.nodes import Worker
from dynamo_mpi.deploy.settings import read_settings as read_launch_settings
from dynamo_mpi.deploy.step_commands import find_source, kv_check_words
from tests.conftest import ROOT

needs_nixl = pytest.mark.skipif(
    not kv_pull.nixl_installed(), reason="NIXL is not installed: pip install --no-deps nixl-cu12"
)
KEY = b"k" * 32
ROLES = ("--prefill", "p1,p2", "--decode", "d1,d2")
PAIRS = [(prefill, decode) for prefill in ("p1", "p2") for decode in ("d1", "d2")]


def pair(prefill: str, decode: str, rate: float = 1e10, transport: str = "nixl", **values: Any) -> PairResult:
    fine = {"paths": ("rc_mlx5/mlx5_0:1",), "latency": 5e-6, "rate": rate}
    return PairResult(prefill, decode, transport, **{**fine, **values})


# -- rules --------------------------------------------------------------------------------------------------------------


def test_pairs_that_are_alike_have_no_finding() -> None:
    results = [pair(prefill, decode, 1e10 + number) for number, (prefill, decode) in enumerate(PAIRS)]
    assert check_kv(results, 0) == []
    said = "4 pairs, slowest 10.0 GB/s, decode host d1 <- prefill host p1 over nixl (rc_mlx5/mlx5_0:1); 5 µs"
    assert summary(results) == said


@pytest.mark.parametrize(
    ("transport", "path", "factor"), [("nixl", "rc_mlx5/mlx5_0:1", 3), ("nixl", "tcp/eth0", 8), ("tcp", "tcp/eth0", 8)]
)
def test_how_slow_is_too_slow_depends_on_the_transport(transport: str, path: str, factor: int) -> None:
    def found(slower: float) -> list[str]:
        rates = [1e10 / slower if one == PAIRS[1] else 1e10 for one in PAIRS]
        results = [pair(*one, rate, transport, paths=(path,)) for one, rate in zip(PAIRS, rates, strict=True)]
        return [finding.rule + finding.found for finding in check_kv(results, 0)]

    assert found(factor - 0.1) == []
    ((said),) = found(factor + 0.1)
    assert said.startswith("T3decode host d2 <- prefill host p1")
    assert said.endswith(f"B/s, expected at least {10 / factor:.1f} GB/s")


def test_few_pairs_are_compared_with_a_given_rate_alone() -> None:
    two = [pair("p1", "d1", 1e8), pair("p1", "d2", 1e10)]
    assert check_kv(two, 0) == []
    assert list(slow_pairs(two, 1e9)) == two[:1]


def test_a_long_latency_is_slow() -> None:
    results = [pair(p, d, latency=6e-3 if (p, d) == PAIRS[0] else 5e-6) for p, d in PAIRS]
    (finding,) = check_kv(results, 0)
    assert finding.found.endswith("6.0 ms for 4 KiB, expected at most 5.0 ms")
    assert check_kv([result._replace(latency=min(result.latency, 4e-3)) for result in results], 0) == []


def test_the_host_that_bad_pairs_have_in_common_is_named() -> None:
    results = [pair(p, d, state=OK if p == "p1" else LATE, text="not done in 6 s") for p, d in PAIRS]
    (finding,) = check_kv(results, 0)
    assert finding.message == "no KV comes through between 2 pairs of hosts of 4: what they have in common is p2"
    assert finding.severity.value == "error"
    (finding,) = check_kv([pair(p, d, wrong=d == "d1") for p, d in PAIRS], 0)
    assert (finding.rule, finding.message) == (
        "T1",
        "wrong bytes arrive between 2 pairs of hosts: what they have in common is d1",
    )
    # one pair of four: either of its hosts is well with the other
    (finding,) = check_kv([pair(p, d, wrong=(p, d) == PAIRS[0]) for p, d in PAIRS], 0)
    assert finding.message == "wrong bytes arrive between 1 pair of hosts"
    (finding,) = check_kv([pair("p1", "d1", wrong=True)], 0)
    assert "common" not in finding.message


def test_sockets_beside_a_card_are_a_warning() -> None:
    over_tcp = pair("p1", "d1", paths=("tcp/eth0",))
    assert check_kv([over_tcp], 0) == []
    (finding,) = check_kv([over_tcp._replace(cards=True)], 0)
    assert (finding.rule, finding.severity.value) == ("T4", "warning")
    assert check_kv([over_tcp._replace(cards=True, transport="tcp")], 0) == []


def test_what_was_left_out_is_said() -> None:
    said = [finding.message for finding in check_coverage(["n1"], 3)]
    assert said == [
        "checked over TCP, which says little about NIXL: not installed on n1",
        "3 pairs not checked: no time left",
    ]


@given(st.integers(1, 9), st.integers(1, 9))
def test_each_pair_has_one_round_and_each_host_one_pair_in_it(prefill: int, decode: int) -> None:
    ps, ds = [f"p{number}" for number in range(prefill)], [f"d{number}" for number in range(decode)]
    found = rounds(ps, ds)
    assert sorted(itertools.chain(*found)) == sorted(itertools.product(ps, ds))
    assert len(found) == max(prefill, decode)
    for one in found:
        hosts = list(itertools.chain(*one))
        assert len(set(hosts)) == len(hosts)


@pytest.mark.parametrize(
    ("log", "paths"),
    [
        ("UCX  INFO  fa5 inter-node cfg#1 rma(rc_mlx5/mlx5_0:1)  am(tcp/eth0)", ("rc_mlx5/mlx5_0:1",)),
        (
            "UCX INFO ep_cfg[0]: rma_am(tcp/eth0) ka(x/y)\nUCX INFO ep_cfg[1]: rma(rc_x/a:1 rc_x/b:1)",
            ("rc_x/a:1", "rc_x/b:1"),
        ),
        ("UCX INFO fa5 self cfg#0 rma(cma/memory)", ()),
        ("", ()),
    ],
)
def test_what_ucx_says_of_its_path(log: str, paths: tuple[str, ...]) -> None:
    assert paths_in(log) == paths


# -- the command --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_environment() -> None:
    environ = {"DYN_MPI_KV_CHECK_SECONDS": "9", "DYN_MPI_KV_MIN_RATE": "2.5", "DYN_MPI_KV_NETWORK": "ib0"}
    settings = read_settings([*ROLES, "--seconds", "7"], environ)
    assert settings == KvCheckSettings(("p1", "p2"), ("d1", "d2"), "auto", "ib0", 7.0, 2.5)


@pytest.mark.parametrize(
    "words",
    [
        ["--prefill", "a"],
        ["--prefill", "a", "--decode", "a"],
        ["--prefill", "a,a", "--decode", "b"],
        ["--prefill", "a,", "--decode", "b"],
        [*ROLES, "--transport", "mpi"],
        [*ROLES, "--seconds", "soon"],
    ],
)
def test_a_wrong_command_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        read_settings(words, {})


def test_a_host_knows_itself_by_slurms_name_its_own_or_an_address() -> None:
    own = os.uname().nodename
    assert find_host(["n1", "n2"], {"SLURMD_NODENAME": "n2"}) == "n2"
    assert find_host(["n1", own], {}) == own
    assert find_host(["192.0.2.1", "127.0.0.1"], {}) == "127.0.0.1"
    with pytest.raises(UsageError, match="this host is none of"):
        find_host(["192.0.2.1"], {})
    with pytest.raises(UsageError, match="this host is localhost, 127"):
        find_host(["localhost", "127.0.0.1"], {})


# -- pairs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter times: what is waited for in vain here never comes."""
    monkeypatch.setattr(kv_pull, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(kv_pull, "LARGE_BYTES", 1 << 22)
    monkeypatch.setattr(kv_pull, "_REPEATS", {1 << 12: 2, 1 << 20: 1, 1 << 22: 1})


@contextlib.contextmanager
def serving(key: bytes = KEY, *, corrupt: bool = False) -> Iterator[Source]:
    server = PatternServer("127.0.0.1")
    server.start(key, pattern(KEY, "p", corrupt=corrupt))
    try:
        yield Source("p", "127.0.0.1", server.port)
    finally:
        server.shutdown()
        server.server_close()


def test_idle_connections_keep_no_pair_from_its_measurement() -> None:
    with serving() as source, contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", source.port)))
        assert run_pair(source, "d", KEY, None).state == OK


def test_a_pair_over_tcp_is_measured() -> None:
    with serving() as source:
        result = run_pair(source, "d", KEY, None)
    assert (result.state, result.wrong, result.paths) == (OK, False, ("tcp/lo",))
    assert result.rate > 0
    assert 0 < result.latency < 1


def test_a_wrong_byte_is_seen() -> None:
    with serving(corrupt=True) as source:
        assert run_pair(source, "d", KEY, None).wrong


def test_neither_side_talks_to_a_stranger() -> None:
    with serving(b"x" * 32) as source:
        result = run_pair(source, "d", KEY, None)
    assert (result.state, result.text) == (FAILED, "the peer doesn't know the key of this run")
    with serving() as source, socket.create_connection((source.address, source.port), timeout=5) as stranger:
        stranger.sendall(bytes(1 << 10))
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := stranger.recv(1 << 10):
                received += part
        # a nonce and a proof for it
        assert len(received) <= 16 + 32


def test_a_host_that_accepts_and_says_nothing_is_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = run_pair(Source("p", "127.0.0.1", listener.getsockname()[1]), "d", KEY, None)
    assert (result.state, result.text) == (LATE, "not done in 1 s")


def test_a_port_that_is_closed_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run_pair(Source("p", "127.0.0.1", port), "d", KEY, None)
    assert (result.state, "refused" in result.text) == (FAILED, True)


def test_a_host_that_stops_in_the_middle_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pull, "PULL_SECONDS", 1.0)
    done = threading.Event()

    def stop(_: PatternServer, request: socket.socket, __: object) -> None:
        peer = kv_pull._Connection(request, time.monotonic() + 5)
        peer.authenticate(KEY, b"prefill", b"decode")
        done.wait(10)

    monkeypatch.setattr(PatternServer, "finish_request", stop)
    with serving() as source:
        result = run_pair(source, "d", KEY, None)
        done.set()
    assert (result.state, result.text) == (LATE, "not done in 2 s")


@needs_nixl
def test_nixl_measures_a_pair_and_outlives_a_peer_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pull, "LARGE_BYTES", 1 << 25)
    monkeypatch.setattr(kv_pull, "PULL_SECONDS", 2.0)
    words = [sys.executable, str(ROOT / "tests/unit/programs/kv_prefill.py"), KEY.hex()]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    agent = NixlAgent()
    with contextlib.ExitStack() as stack:
        peers = []
        for other_run in (KEY, KEY, b"x" * 32):
            command = [*words, other_run.hex()]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, env=environ))
            stack.callback(process.kill)
            assert process.stdout is not None
            peers.append((process, Source(*json.loads(process.stdout.readline()))))
        (first, source), (_, second), (_, wrong) = peers
        result = run_pair(source, "d", KEY, agent)
        assert (result.state, result.wrong) == (OK, False), result
        assert result.rate > 0
        assert result.paths
        assert run_pair(wrong, "d", KEY, agent).wrong
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert run_pair(source, "d", KEY, agent).state != OK
        assert time.monotonic() - began < 6
        assert run_pair(second, "d", KEY, agent).state == OK


# -- ranks --------------------------------------------------------------------------------------------------------------


class ThreadMail:
    """What `Mail` is, between threads of this process."""

    def __init__(self, boxes: dict[tuple[int, int], queue.Queue[dict[str, Any]]], rank: int, size: int) -> None:
        self._boxes, self.rank, self.size = boxes, rank, size
        self.wait = lambda: None

    def send(self, rank: int, content: dict[str, Any]) -> None:
        self._boxes[self.rank, rank].put(json.loads(json.dumps(content)))

    def receive(self, rank: int, end: float) -> dict[str, Any] | None:
        with contextlib.suppress(queue.Empty):
            return self._boxes[rank, self.rank].get(timeout=max(0.0, end - time.monotonic()))
        return None


class RecordingLogger(RankLogger):
    def __init__(self) -> None:
        super().__init__(0, "p1")
        self.texts: list[str] = []

    def _emit(self, level: str, text: str, *_: object) -> None:
        self.texts.append(text)


def run_check(monkeypatch: pytest.MonkeyPatch, *absent: str, hang: str = "", **changes: Any) -> tuple[int, str]:
    """Run the check between four ranks in threads; those on hosts in ``absent`` never come, ``hang`` obeys no order."""
    settings = read_settings(ROLES, {})._replace(**{"transport": "tcp", "kv_network": "127.0.0.1", **changes})
    hosts, said = (*settings.prefill, *settings.decode), RecordingLogger()
    monkeypatch.setattr(kv, "HELLO_SECONDS", 1.0)
    monkeypatch.setattr(kv, "_LOAD_SECONDS", 2.0)
    monkeypatch.setattr(kv, "find_host", lambda *_: threading.current_thread().name)
    boxes: dict[tuple[int, int], queue.Queue[dict[str, Any]]] = {
        (one, other): queue.Queue() for one in range(4) for other in range(4)
    }
    ranks = [KvPathCheck(settings, ThreadMail(boxes, rank, 4), said) for rank in range(4)]  # type: ignore[arg-type] # what is needed of one
    over = threading.Event()
    if hang:
        monkeypatch.setattr(ranks[hosts.index(hang)], "_handle_order", lambda _: {"hung": over.wait(20)})
    codes: list[int] = [-1] * 4

    def run(rank: int) -> None:
        codes[rank] = ranks[rank].run()

    threads = [threading.Thread(target=run, args=(rank,), name=host) for rank, host in enumerate(hosts)]
    for host, thread in zip(hosts, threads, strict=True):
        if host not in absent:
            thread.start()
    threads[0].join(30)
    over.set()
    for host, thread in zip(hosts, threads, strict=True):
        if host not in absent:
            thread.join(30)
            assert not thread.is_alive()
    assert {code for host, code in zip(hosts[1:], codes[1:], strict=True) if host not in (*absent, hang)} == {0}
    return codes[0], "\n".join(said.texts)


def test_ranks_measure_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_check(monkeypatch)
    assert (code, said.startswith("kv check: 4 pairs, slowest ")) == (0, True), said


def test_a_rank_that_never_comes_costs_its_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_check(monkeypatch, "p2")
    assert code == 75
    assert "between 2 pairs of hosts of 4: what they have in common is p2" in said
    assert "d1 <- prefill host p2 over tcp: p2 sends nothing to rank 0 on p1" in said


def test_a_rank_that_hangs_costs_its_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_check(monkeypatch, hang="d2")
    assert code == 75
    assert "between 2 pairs of hosts of 4: what they have in common is d2" in said
    assert "d2 gave no answer in 2 s" in said


def test_pairs_without_time_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_check(monkeypatch, seconds=0.0)
    assert (code, "4 pairs not checked: no time left" in said) == (0, True), said


def test_a_pair_is_measured_again_before_it_is_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[tuple[str, str]] = []

    def pull(source: Source, decode: str, *_: object) -> PairResult:
        tries.append((source.host, decode))
        return pair(
            source.host, decode, 1e8 if tries == [*tries[:-1], ("p1", "d1")] and len(tries) < 5 else 1e10, "tcp"
        )

    monkeypatch.setattr(kv_pull, "run_pair", pull)
    code, said = run_check(monkeypatch)
    assert (code, tries.count(("p1", "d1")), len(tries)) == (0, 2, 5), said


def test_nixl_on_some_hosts_alone_is_no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pull, "nixl_installed", lambda: threading.current_thread().name != "d2")
    code, said = run_check(monkeypatch, transport="auto")
    assert (code, "says little about NIXL: not installed on d2" in said) == (0, True), said
    code, said = run_check(monkeypatch, transport="nixl")
    assert (code, "NIXL is not installed on d2" in said) == (64, True), said


def test_a_nixl_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def agent() -> object:
        if threading.current_thread().name == "p2":
            raise NixlError("NIXL: no UCX here")
        return Silent()

    class Silent:
        def share(self, _: bytes) -> tuple[str, int]:
            return "", 0

        def progress(self) -> None: ...

    monkeypatch.setattr(kv_pull, "nixl_installed", lambda: True)
    monkeypatch.setattr(kv_pull, "NixlAgent", agent)
    monkeypatch.setattr(kv_pull, "run_pair", lambda source, decode, *_: pair(source.host, decode))
    code, said = run_check(monkeypatch, transport="auto")
    assert code == 75
    assert "d1 <- prefill host p2 over nixl: p2: NIXL: no UCX here" in said


def test_a_rank_that_can_not_take_part_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_check(monkeypatch, kv_network="no-such-interface")
    assert (code, "this host has no address by no-such-interface" in said) == (64, True), said


@pytest.mark.parametrize("words", [("--kv-network", "ib0"), ("--kv-network=ib0",)])
def test_launch_gives_the_check_the_workers_network(words: tuple[str, ...]) -> None:
    engines = {"prefill_engine_config": "p.yaml", "decode_engine_config": "d.yaml"}
    settings = read_launch_settings(
        {"model": "/m", "launcher": "slurm", **engines}, ("--kv-network", "eth0", *words), {}
    )
    workers = [Worker(f"{role}-0", role, "p.yaml", (node,), 1) for role, node in (("prefill", "n1"), ("decode", "n2"))]
    command = kv_check_words(settings, find_source(None, None), workers)
    assert command[-len(words) :] == words
    assert "eth0" not in command


def test_without_a_launcher_mpi_is_not_started(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PMI", "OMPI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(kv, "start_mpi", lambda: pytest.fail("MPI was started"))
    assert kv.main(["--prefill", "a", "--decode", "b"]) == ExitCode.USAGE
    assert "started without a launcher" in capfd.readouterr().err
