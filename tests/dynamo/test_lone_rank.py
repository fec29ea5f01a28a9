# SPDX-License-Identifier: Apache-2.0
"""A worker of one rank has no other that would notice: its node agent does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.dynamo.running import EtcdServer, RunningWorker, eventually, failure_in

pytestmark = pytest.mark.dynamo
HEARTBEAT = 2.0


@pytest.mark.landing("kill")
@pytest.mark.parametrize(
    ("number", "noticed_after", "said"),
    [(signal.SIGKILL, 0.0, "died: "), (signal.SIGSTOP, HEARTBEAT, "is stopped or stuck: ")],
    ids=["kill", "stop"],
)
def test_its_end_is_reported_and_it_leaves_discovery_at_once(
    tmp_path: Path, etcd: EtcdServer, small_model_dir: Path, number: signal.Signals, noticed_after: float, said: str
) -> None:
    flags = ("--heartbeat-timeout", str(HEARTBEAT), "--failure-dir", str(tmp_path / "failures"))
    worker = RunningWorker(tmp_path, etcd, small_model_dir, 1, *flags)
    try:
        worker.ready()
        assert etcd.keys("v1/instances/")
        assert etcd.worlds()
        begin = time.monotonic()
        os.kill(worker.rank_zero(), number)
        eventually(lambda: not etcd.keys() and not etcd.worlds(), "the keys are gone", noticed_after + 1.5)
        assert worker.wait() == 137 if number is signal.SIGKILL else worker.wait() != 0, worker.text()
        assert time.monotonic() - begin < noticed_after + 3
        line = f"dynamo_mpi: rank 0 on {os.uname().nodename}: error in serve: {said}"
        eventually(lambda: line in worker.text(), "it is reported", 1)
        assert worker.text().count(": error in ") == 1, worker.text()
        failure = failure_in(tmp_path / "failures" / "backend-rank-0.json")
        assert (failure["rank"], failure["phase"], failure["exit_code"]) == (0, "serve", 124 if noticed_after else 70)
    finally:
        worker.stop()


def test_an_orderly_end_is_none_of_its_business(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> None:
    worker = RunningWorker(tmp_path, etcd, small_model_dir, 1, "--failure-dir", str(tmp_path / "failures"))
    try:
        os.kill(int(worker.ready()["pid"]), signal.SIGTERM)
        assert worker.wait() == 0, worker.text()
        assert "error in" not in worker.text()
        assert not (tmp_path / "failures").exists()
        assert not etcd.keys()
    finally:
        worker.stop()
