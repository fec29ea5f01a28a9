# SPDX-License-Identifier: Apache-2.0
"""KV by NIXL between two processes: whole or not at all, in time, whatever becomes of the peer; and nothing piles up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_mpi.engines.reference import nixl_library
from dynamo_mpi.engines.reference.gguf_tensors import Float32Array
from dynamo_mpi.engines.reference.kv_arena import Arena
from dynamo_mpi.engines.reference.kv_client import FetchError, fetch
from dynamo_mpi.engines.reference.kv_nixl import NixlAgent
from dynamo_mpi.engines.reference.kv_offer import NIXL, TCP, CacheLayout, Holder, Offer, digest_of
from dynamo_mpi.engines.reference.kv_server import KvServer
from dynamo_mpi.engines.reference.kv_shards import Piece
from dynamo_mpi.engines.reference.kv_socket import Deadline
from dynamo_mpi.engines.reference.kv_store import KvStore, StoreFullError
from dynamo_mpi.engines.reference.kv_wire import Located
from dynamo_mpi.errors import UsageError
from tests.unit.kv_hosts import needs_nixl
from tests.unit.programs.nixl_prefill import HEAD_DIM, HOLDING, SECRET, TRANSFER, kept_values

PROGRAM = Path(__file__).parent / "programs" / "nixl_prefill.py"
TOKENS = 700
WHOLE = Piece(0, HOLDING.layers, HOLDING.heads)


class Peer:
    """A prefill rank in a process of its own."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.process.stdout is not None
        self.said: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.offer = offer_at(self.said["port"], tokens)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """End it as an engine ends; return its exit status."""
        self.send(signal.SIGCONT)
        self.process.communicate(timeout=20)
        return self.process.returncode


def offer_at(port: int, tokens: int, transport: str = NIXL) -> Offer:
    layout = CacheLayout("m", len(HOLDING.layers), len(HOLDING.heads), HEAD_DIM, 32)
    holders = (Holder("127.0.0.1", port, HOLDING),)
    return Offer(TRANSFER, SECRET, layout, 1, 1, tokens, digest_of(range(tokens)), 1, holders, transport)


@contextlib.contextmanager
def running_peer(tokens: int = TOKENS) -> Iterator[Peer]:
    peer = Peer(tokens)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.communicate()


@pytest.fixture(params=["", "tcp"], ids=["shared memory", "tcp"])
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
    with running_peer() as peer:
        yield peer


@pytest.fixture
def agent() -> Iterator[NixlAgent]:
    agent = NixlAgent("127.0.0.1")
    yield agent
    agent.close()


def get(peer: Peer, agent: NixlAgent, piece: Piece = WHOLE, seconds: float = 20) -> Float32Array:
    return fetch(peer.offer, piece, Deadline.after(seconds), agent)


def refused(peer: Peer, agent: NixlAgent, seconds: float = 20) -> str:
    with pytest.raises(FetchError) as error:
        get(peer, agent, seconds=seconds)
    return str(error.value)


def counting(counts: dict[str, int], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        counts[name] += 1
        return call(*arguments)

    return counted


def on_reading(monkeypatch: pytest.MonkeyPatch, agent: NixlAgent, act: Callable[[Located], None]) -> None:
    """Do something between the peer's having said where KV lies and its being read."""
    read = agent.read

    def with_act(located: Located, *arguments: Any) -> None:
        act(located)
        read(located, *arguments)

    monkeypatch.setattr(agent, "read", with_act)


@needs_nixl
def test_pieces_arrive_as_they_were_kept_and_nothing_piles_up(
    peer: Peer, agent: NixlAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = kept_values(TOKENS)
    assert np.array_equal(get(peer, agent), values)

    nixl, counts = agent._agent, {"register_memory": 0, "deregister_memory": 0, "release_xfer_handle": 0}
    for name in counts:
        monkeypatch.setattr(nixl, name, counting(counts, name, getattr(nixl, name)))
    for _ in range(30):
        assert np.array_equal(get(peer, agent, Piece(0, range(1, 3), range(1, 2))), values[:, 1:3, 1:2])
    assert set(counts.values()) == {30}
    assert (len(agent._peers), len(agent._late)) == (1, 0)
    assert [other.users for other in agent._peers.values()] == [0]
    assert peer.end() == 0


@needs_nixl
def test_a_peer_that_is_killed_before_it_is_read_is_an_error(
    peer: Peer, agent: NixlAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(peer, agent)

    def kill(_: Located) -> None:
        peer.send(signal.SIGKILL)
        peer.process.wait()

    on_reading(monkeypatch, agent, kill)
    began = time.monotonic()

    assert "prefill rank 0" in refused(peer, agent)
    assert time.monotonic() - began < 5
    assert not agent._peers


@needs_nixl
def test_a_peer_that_stops_meets_the_deadline_and_its_late_answer_harms_nobody(
    agent: NixlAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # shared memory is read without the peer's help
    with running_peer() as peer, running_peer(300) as other:
        get(peer, agent)
        with monkeypatch.context() as once:
            on_reading(once, agent, lambda _: peer.send(signal.SIGSTOP))
            began = time.monotonic()
            assert "timed out" in refused(peer, agent, seconds=1.5)
            assert time.monotonic() - began < 4
        (late,) = agent._late
        assert np.array_equal(get(other, agent), kept_values(300))
        assert agent._late == [late]

        peer.send(signal.SIGCONT)
        for _ in range(200):
            assert np.array_equal(get(peer, agent), kept_values(TOKENS))
            if not agent._late:
                break
        assert not agent._late
        assert peer.end() == other.end() == 0


@needs_nixl
def test_an_agent_closes_with_a_read_that_never_ended(agent: NixlAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with running_peer() as peer:
        get(peer, agent)
        on_reading(monkeypatch, agent, lambda _: peer.send(signal.SIGSTOP))
        refused(peer, agent, seconds=0.3)
        agent.close()
        agent.close()


@needs_nixl
def test_a_stopped_read_waits_without_a_busy_loop(agent: NixlAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with running_peer() as peer:
        get(peer, agent)
        on_reading(monkeypatch, agent, lambda _: peer.send(signal.SIGSTOP))
        before = time.process_time()
        refused(peer, agent, seconds=2)
        assert time.process_time() - before < 0.6


@needs_nixl
def test_other_bytes_than_those_kept_are_damage(agent: NixlAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_peer() as peer:
        read = agent.read
        monkeypatch.setattr(
            agent, "read", lambda located, *more: read(replace(located, address=located.address + 4), *more)
        )
        with pytest.raises(FetchError, match="damaged"):
            get(peer, agent, Piece(0, range(2), range(1)))


@needs_nixl
def test_what_is_being_read_stays_in_its_place_when_it_is_forgotten(
    agent: NixlAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = kept_values(10)
    server_agent, store = NixlAgent("127.0.0.1"), KvStore(20, 60)
    store.arena = Arena(2 * values.size)
    server_agent.share(store.arena.memory)
    store.keep(TRANSFER, SECRET, HOLDING, list(values))
    server = KvServer(store, "127.0.0.1", server_agent)

    def forget(_: Located) -> None:
        store.release(TRANSFER)
        store.keep(b"u" * 16, SECRET, HOLDING, list(np.zeros_like(values)))
        with pytest.raises(StoreFullError, match="is being read"):
            store.keep(b"v" * 16, SECRET, HOLDING, list(np.zeros_like(values)))

    on_reading(monkeypatch, agent, forget)
    try:
        fetched = fetch(offer_at(server.address[1], 10), WHOLE, Deadline.after(20), agent)
        assert np.array_equal(fetched, values)
        assert len(store) == 1
    finally:
        server.close()
        server_agent.close()


@needs_nixl
@pytest.mark.parametrize(
    "changes", [{"address": 64}, {"agent": b""}, {"agent": b"nixl?" * 30}, {"layer_stride": 2**40}]
)
def test_a_peer_that_locates_nonsense_is_an_error(
    agent: NixlAgent, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    with running_peer(10) as peer:
        read = agent.read
        monkeypatch.setattr(agent, "read", lambda located, *more: read(replace(located, **changes), *more))
        assert "NIXL" in refused(peer, agent)
        monkeypatch.undo()
        assert np.array_equal(get(peer, agent), kept_values(10))


@needs_nixl
def test_peers_that_nobody_asks_are_forgotten() -> None:
    agent = NixlAgent("127.0.0.1", peers=1)
    with running_peer(10) as one, running_peer(11) as other:
        for _ in range(2):
            for peer, tokens in ((one, 10), (other, 11)):
                assert np.array_equal(get(peer, agent), kept_values(tokens))
                assert len(agent._peers) == 1
    agent.close()


@needs_nixl
def test_nixl_listens_where_it_was_told_to_and_idles_without_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with running_peer(10) as peer:
        assert peer.said["listening"] == ["127.0.0.1"]
        stat = Path(f"/proc/{peer.process.pid}/stat")
        before = stat.read_text().rpartition(")")[2].split()[11:13]
        time.sleep(1)
        after = stat.read_text().rpartition(")")[2].split()[11:13]
        ticks = sum(map(int, after)) - sum(map(int, before))
        assert ticks / os.sysconf("SC_CLK_TCK") < 0.1


def test_an_offer_by_another_transport_than_the_server_has_is_an_error() -> None:
    store = KvStore(10, 60)
    store.keep(TRANSFER, SECRET, HOLDING, list(kept_values(10)))
    server = KvServer(store, "127.0.0.1")
    try:
        with pytest.raises(FetchError, match="another transport"):
            fetch(offer_at(server.address[1], 10), WHOLE, Deadline.after(5), NixlAgent())
        assert np.array_equal(
            fetch(offer_at(server.address[1], 10, TCP), WHOLE, Deadline.after(5), NixlAgent()), kept_values(10)
        )
    finally:
        server.close()


def test_a_host_without_nixl_is_told_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_library, "_PACKAGES", ("nixl_of_no_host",))
    assert not nixl_library.nixl_installed()
    with pytest.raises(UsageError, match="NIXL is not installed here") as error:
        NixlAgent().open()
    assert "pip install" in str(error.value.fix)
    assert "--kv-transport tcp" in str(error.value.fix)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", r"libcuda\.so\.1"),
        ("import torch_of_no_host", "nixl_broken.* needs torch_of_no_host, which is not installed"),
    ],
)
def test_a_nixl_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, why: str
) -> None:
    package = tmp_path / f"nixl_broken_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_api.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nixl_library, "_PACKAGES", (package.name,))
    assert importlib.util.find_spec(package.name) is not None
    with pytest.raises(UsageError, match=f"can't be used on this host: {why}"):
        NixlAgent().open()
