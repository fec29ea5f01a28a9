# SPDX-License-Identifier: Apache-2.0
"""The events of real workers over a real NATS: in their order, to the last one; and a NATS that dies does no harm."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dynamo.running import EtcdServer, NatsServer, RunningWorker, eventually
from tests.nats_listener import listening_to
from tests.servers import running_nats

pytestmark = pytest.mark.dynamo
WHO = {"NATS_AUTH_USERNAME": "me", "NATS_AUTH_PASSWORD": "w0rd"}
BEGIN = ["phase preflight", "phase load", "phase warmup", "phase register", "ready", "phase serve"]
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    workers: list[RunningWorker] = []

    def begin(ranks: int = 3, **variables: str) -> RunningWorker:
        usual = {"OMP_NUM_THREADS": "1", "PRTE_MCA_hwloc_default_binding_policy": "none", "DYN_MPI_LAUNCH": "x-0"}
        words = ("--engine", "reference")
        workers.append(
            RunningWorker(tmp_path, etcd, model_dir, ranks, *words, name=f"w{len(workers)}", **usual, **variables)
        )
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def test_a_life_in_order_and_one_that_a_killed_rank_ends(start: Start) -> None:
    with (
        running_nats('authorization { user: "me", password: "w0rd" }') as url,
        listening_to(url, **{"user": "me", "pass": "w0rd"}) as heard,
    ):
        worker = start(NATS_SERVER=url, **WHO)
        pid = worker.rank_zero()
        os.kill(pid, signal.SIGTERM)
        assert worker.wait() == 0, worker.text()
        eventually(lambda: heard.events[-1] == "exit", "the last event has come")
        assert heard.events == [*BEGIN, "phase drain", "drain", "phase exit", "exit"]
        subjects = {subject for subject, _ in heard.messages}
        assert all(subject.startswith("dynamo_mpi.v1.dynamo.backend.") for subject in subjects)
        body = heard.messages[-1][1]
        assert (body["schema"], body["event"], body["exit_code"], body["phase"]) == (1, "exit", 0, "exit")
        assert (body["pid"], body["launch"], body["role"], body["attempt"]) == (pid, "x-0", "agg", 1)
        times = [body["time"] for _, body in heard.messages]
        assert times == sorted(times)

        heard.messages.clear()
        worker = start(NATS_SERVER=url, **WHO)
        os.kill(worker.ranks()[1], signal.SIGKILL)
        assert worker.wait() != 0
        eventually(lambda: "failed" in heard.events, f"it has failed\n{worker.text()}", 5)
        assert heard.events[: len(BEGIN) + 1] == [*BEGIN, "failed"]
        failure: dict[str, Any] = heard.messages[len(BEGIN)][1]["failure"]
        assert (failure["cause"], failure["exit_code"], failure["phase"]) == ("disconnect", 70, "serve")
        assert "error in serve: rank" in failure["report"]
        if heard.events[-1] == "exit":  # the launcher may be faster
            assert heard.messages[-1][1]["exit_code"] == 70
        assert "w0rd" not in json.dumps(heard.messages) + worker.text()


def test_a_nats_that_dies_while_it_serves_does_no_harm(tmp_path: Path, start: Start) -> None:
    nats = NatsServer(tmp_path)
    nats.start()
    try:
        worker = start(ranks=1, NATS_SERVER=nats.url)
        pid = worker.rank_zero()
        nats.stop()
        os.kill(pid, signal.SIGTERM)
        assert worker.wait() == 0, worker.text()
        assert "Traceback" not in worker.text()
        assert "exit: done" in worker.text()
    finally:
        nats.stop()


def test_wrong_and_absent_credentials_are_refused_before_the_load(start: Start) -> None:
    with running_nats('authorization { token: "w0rd" }') as url:
        worker = start(ranks=1, NATS_SERVER=url)
        assert worker.wait() == 77, worker.text()
        assert "NATS requires credentials, and none are set" in worker.text()
        worker = start(ranks=1, NATS_SERVER=url, **WHO)
        assert worker.wait() == 77, worker.text()
        assert "correct NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD" in worker.text()
        assert "ready" not in worker.text()
