# SPDX-License-Identifier: Apache-2.0
"""`--probe kv` of two real workers: whoever comes second has the decode ranks pull, both know what came out, and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.control_plane.records import WorkerRecord
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually
from tests.unit.kv_hosts import needs_ucx

pytestmark = pytest.mark.dynamo
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
RANKS = {"prefill": 3, "decode": 1}
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    """Start workers by role; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(role: str, *flags: str, **environment: str) -> RunningWorker:
        own = () if "--engine" in flags else ("--engine", "reference")
        words = (*own, "--role", role, "--kv-network", "127.0.0.1", "--probe", "kv", *flags)
        variables = {"ETCD_LEASE_TTL": "3", "OMP_NUM_THREADS": "1", **UNBOUND, **environment}
        workers.append(RunningWorker(tmp_path, etcd, model_dir, RANKS[role], *words, name=role, **variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def record_of(etcd: EtcdServer, role: str) -> WorkerRecord | None:
    return next((record for record in etcd.worlds() if record.role == role), None)


def offered(etcd: EtcdServer, role: str) -> list[Any] | None:
    """Return where its ranks can be asked."""
    record = record_of(etcd, role)
    return None if record is None or record.probe_kv is None else record.probe_kv["stations"]


def kv_of(etcd: EtcdServer, role: str) -> dict[str, Any] | None:
    """Return what its record says of its one partner."""
    record = record_of(etcd, role)
    peers = (record.probe or {}).get("kv", {}).get("peers") if record is not None else None
    return peers[0] if peers else None


def stations(etcd: EtcdServer) -> set[int]:
    """Return the processes that can be asked, of this test's workers."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words, environ = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            if b"dynamo_mpi.probe.kv_station" in words and f"ETCD_ENDPOINTS={etcd.url}".encode() in environ:
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_both_sides_know_what_the_second_has_found(first: str, etcd: EtcdServer, start: Start) -> None:
    second = "decode" if first == "prefill" else "prefill"
    workers = {first: start(first)}
    eventually(lambda: offered(etcd, first), "its ranks can be asked")
    workers[second] = start(second)
    for role in (second, first):
        figures = eventually(partial(kv_of, etcd, role), f"{role} knows")
        assert (figures["pairs"], figures["through"], figures["over"]) == (3, 3, "tcp")
        assert 0 < figures["gbps"][0] <= figures["gbps"][1]
        assert second in figures["peer"] if role == first else first in figures["peer"]
        assert figures["ways"]
        line = r"kv: 3 pairs over tcp.*B/s slowest, decode rank 0 on \S+ <- prefill rank [012] on"
        assert re.search(line, workers[role].text()), workers[role].text()
    for worker in workers.values():
        worker.ready()
    for worker in workers.values():
        os.kill(worker.rank_zero(), signal.SIGTERM)
        assert worker.wait() == 0, worker.text()
        assert "Traceback" not in worker.text()
        # on a busy host one pair may well be slower
        assert set(re.findall("(?:warning|error) (T[0-9])", worker.text())) <= {"T3"}
    assert etcd.keys() == []
    assert not stations(etcd)


def test_wrong_bytes_end_a_strict_second_before_it_loads_and_the_first_says_so(etcd: EtcdServer, start: Start) -> None:
    prefill = start("prefill", DYN_MPI_ALLOW_FAULTS="1", DYN_MPI_FAULT="rank1:probe:corrupt")
    eventually(lambda: offered(etcd, "prefill"), "its ranks can be asked")
    decode = start("decode", "--probe-strict")
    assert decode.wait() == 75, decode.text()
    wrong = r"(?:error|warning) T1: KV is wrong when it arrives, of 1 pair of ranks\n +found: +decode rank 0 on \S+ <- prefill rank 1 on"
    assert "1 error, nothing was loaded" in decode.text()
    assert re.search(wrong, decode.text()), decode.text()
    eventually(lambda: re.search(wrong, prefill.text()), "the first says so")
    prefill.ready()


def test_a_rank_that_does_not_answer_is_named_and_ends_only_who_is_strict(etcd: EtcdServer, start: Start) -> None:
    prefill = start("prefill")
    ports = eventually(lambda: offered(etcd, "prefill"), "its ranks can be asked")
    stopped = next(pid for pid in stations(etcd) if listens_on(pid, ports[2][2]))
    os.kill(stopped, signal.SIGSTOP)
    decode = start("decode", "--probe-strict", "--probe-seconds", "8")
    assert decode.wait() == 75, decode.text()
    assert "error T2: no KV comes through between 1 pair of ranks of 3: prefill rank 2 on" in decode.text()
    assert re.search(r"found: +decode rank 0 on \S+ <- prefill rank 2 on \S+ \(127.0.0.1\): not done in", decode.text())
    prefill.ready()
    # it was told, and goes on
    assert "warning T2" in prefill.text()
    # as if the time of rank 0's were over
    os.kill(next(pid for pid in stations(etcd) if listens_on(pid, ports[0][2])), signal.SIGKILL)
    eventually(lambda: offered(etcd, "prefill") is None, "nobody can ask it any more")
    os.kill(stopped, signal.SIGCONT)
    os.kill(prefill.rank_zero(), signal.SIGTERM)
    assert prefill.wait() == 0, prefill.text()
    assert not stations(etcd)


@needs_ucx
def test_trtllm_is_probed_over_what_its_engine_config_names(etcd: EtcdServer, start: Start) -> None:
    trtllm = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")
    backend = ("--trtllm.cache_transceiver_config.backend", "UCX")
    standins = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/standins"), str(ROOT)]), "UCX_TLS": "tcp,self"}
    prefill = start("prefill", *trtllm, *backend, **standins)
    eventually(lambda: offered(etcd, "prefill"), "its ranks can be asked")
    decode = start("decode", *trtllm, *backend, **standins)
    eventually(lambda: kv_of(etcd, "prefill"), "both know")
    line = r"kv: 3 pairs over ucx \(tcp/\w+\): .* slowest, decode rank 0 on \S+ <- prefill rank [012] on"
    for worker in (prefill, decode):
        # the record may know before the line is said
        eventually(partial(says, worker, line), f"{line} in\n{worker.text()}", 10)


def says(worker: RunningWorker, line: str) -> bool:
    """Has it said so?"""
    return re.search(line, worker.text()) is not None


def listens_on(pid: int, port: int) -> bool:
    """Does a process listen on an IPv4 port (proc(5))?"""
    ours = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    return any(
        row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port and f"socket:[{row[9]}]" in ours for row in rows
    )
