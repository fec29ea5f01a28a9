# SPDX-License-Identifier: Apache-2.0
"""etcd and NATS go while a worker serves: a short absence is nothing; a worker that loses its lease reports it, ends in order with 75.

Never does a worker go on that no client can find, and never does one that was lost look like one that has finished.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.deploy.services import Frontend
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, NatsServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_worker_life import Stream

pytestmark = pytest.mark.dynamo
LEASE = 5
"""Seconds: of the worker's lease and of its record's."""
# rank 0 looks three times in a lease's life; an orderly end, on two shared cores, comes on top
NOTICED_SECONDS = LEASE / 3 + 5.0
TRTLLM = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")
KINDS = ["reference", "trtllm"]
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    """Start a worker of one kind or the other; what is left of it is killed."""
    workers: list[RunningWorker] = []

    def begin(kind: str, *flags: str, ranks: int = 1, **environment: str) -> RunningWorker:
        variables = {"ETCD_LEASE_TTL": str(LEASE), "OMP_NUM_THREADS": "1"}
        if kind == "trtllm":
            paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
            variables |= {
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
            }
            flags = (*TRTLLM, *flags)
        words = ("--probe-timeout", "1", *flags)
        workers.append(RunningWorker(tmp_path, etcd, model_dir, ranks, *words, **(variables | environment)))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS of this test's own."""
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


def answers(frontend: Frontend, model: str) -> bool:
    """Return whether a request for two tokens is answered now."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 2}
    url, headers = f"http://127.0.0.1:{frontend.port}/v1/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - the tests' own loopback address
            return int(reply.status) == 200
    except urllib.error.HTTPError:
        return False


def outlives_its_lease(worker: RunningWorker, etcd: EtcdServer, keys: list[str]) -> None:
    """See that the worker is still there, under the same keys, when a lease without renewals would have ended."""
    begin = time.monotonic()
    eventually(lambda: time.monotonic() > begin + 1.5 * LEASE, "time passes")
    assert worker.process.poll() is None, worker.text()
    assert etcd.keys() == keys


def lost(worker: RunningWorker, etcd: EtcdServer) -> str:
    """Wait for the end of a worker whose lease is lost, and return its one report."""
    assert worker.wait() == 75, worker.text()
    (report,) = re.findall(r"^dynamo_mpi: rank 0 on [^\n]*: error in (?:[^\n]|\n  )*", worker.text(), re.MULTILINE)
    assert "expected: " in report or "fix: " in report
    assert "MPI_ABORT" not in worker.text(), "the ranks have left in order"
    assert "Traceback" not in worker.text()
    assert session_members(worker.process.pid) == []
    assert not worker.ready_file.exists()
    return str(report)


@pytest.mark.landing("trtllm")
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_absence_is_nothing_and_an_etcd_that_has_forgotten_the_worker_ends_it(
    kind: str, start: Start, etcd: EtcdServer, nats: NatsServer, tmp_path: Path, model_dir: Path
) -> None:
    worker = start(kind, ranks=3 if kind == "reference" else 1, NATS_SERVER=nats.url)
    worker.ready()
    keys = etcd.keys()
    assert len(keys) == 2
    with running_frontend(tmp_path, etcd, ETCD_LEASE_TTL="60") as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        nats.stop()
        with etcd.frozen() if kind == "trtllm" else etcd.stopped():
            assert answers(frontend, model_dir.name), "its requests need neither"
        nats.start()
        outlives_its_lease(worker, etcd, keys)
        assert answers(frontend, model_dir.name)
        assert len(etcd.worlds()) == 1

        # what somebody deletes is there again, under the same lease
        etcd.delete("v1/")
        # dynamo.trtllm deletes them itself when it is asked to end, and has the time for that
        timeout_seconds = NOTICED_SECONDS + (2 * LEASE if kind == "trtllm" else 0)
        eventually(lambda: etcd.keys() == keys, "the keys are written again", timeout_seconds)
        eventually(lambda: answers(frontend, model_dir.name), "it is found again", 20)

        events = Stream(frontend.port, model_dir.name, 60 if kind == "reference" else 10).events()
        next(events)
        etcd.forget()
        if kind == "reference":
            assert list(events)[-1] == "[DONE]", "what was in flight is finished"
        begin = time.monotonic()
        report = lost(worker, etcd)
        assert time.monotonic() - begin < NOTICED_SECONDS
    assert "etcd has lost this worker's lease: it answers, but no longer has the lease" in report
    assert etcd.keys() == [] == etcd.worlds()


@pytest.mark.landing("reference")
@pytest.mark.parametrize("kind", KINDS)
def test_an_etcd_that_is_away_for_longer_than_the_lease_ends_the_worker(
    kind: str, start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path
) -> None:
    worker = start(kind)
    worker.ready()
    with running_frontend(tmp_path, etcd, ETCD_LEASE_TTL="60") as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        # longer than the lease lives; dynamo.trtllm's runtime cuts such a request off
        events = Stream(frontend.port, model_dir.name, 150).events() if kind == "reference" else iter(())
        next(events, None)
        begin = time.monotonic()
        etcd.stop()
        assert list(events)[-1:] == (["[DONE]"] if kind == "reference" else []), "what was in flight is finished"
        finished = time.monotonic()
        report = lost(worker, etcd)
        assert begin + LEASE / 2 < time.monotonic() < max(finished, begin + LEASE) + NOTICED_SECONDS
    # as the runtime sees it, or, while that still waits for a request, the watch
    assert "longer than this worker's lease lives" in report
    assert "start the worker again" in report


@pytest.mark.full
def test_an_etcd_that_hangs_for_longer_than_the_lease_ends_the_worker(start: Start, etcd: EtcdServer) -> None:
    """Dynamo's runtime waits for it for ever."""
    worker = start("reference", ranks=3)
    worker.ready()
    with etcd.frozen():
        report = lost(worker, etcd)
    assert re.search(rf"etcd has not answered for \d+ s, longer than this worker's lease lives \({LEASE} s\)", report)
    eventually(lambda: not etcd.keys() and not etcd.worlds(), "what it had written is gone", 2 * LEASE)


def test_over_nats_a_worker_serves_again_when_nats_is_back(
    start: Start, etcd: EtcdServer, nats: NatsServer, tmp_path: Path, model_dir: Path
) -> None:
    plane = {"NATS_SERVER": nats.url}
    worker = start("reference", "--request-plane", "nats", **plane)
    worker.ready()
    keys = etcd.keys()
    with running_frontend(tmp_path, etcd, "nats", NATS_SERVER=nats.url) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        assert answers(frontend, model_dir.name)
        nats.stop()
        nats.start()
        eventually(lambda: answers(frontend, model_dir.name), "it answers again", 60)
    assert (worker.process.poll(), etcd.keys()) == (None, keys)
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
