# SPDX-License-Identifier: Apache-2.0
"""Faults in a serving worker of three ranks: the world ends at once, says why, and is out of discovery before its lease would end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.services.processes import session_members
from tests.dynamo.running import EtcdServer, RunningWorker, eventually

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]
HEARTBEAT = 2.0
PROMPT_SECONDS = 3.0


@pytest.fixture
def serving(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[RunningWorker]:
    """A worker of three ranks that serves; what is left of it is killed."""
    flags = ("--heartbeat-timeout", str(HEARTBEAT), "--failure-dir", str(tmp_path / "failures"))
    worker = RunningWorker(tmp_path, etcd, model_dir, 3, *flags)
    worker.ready()
    yield worker
    worker.stop()


@pytest.mark.parametrize(
    ("number", "codes", "said", "seconds"),
    [
        (signal.SIGKILL, (137, 70), "rank 1 on {host} died: ", PROMPT_SECONDS),
        (signal.SIGSTOP, (124,), "rank 1 on {host} is stopped or stuck: ", HEARTBEAT + PROMPT_SECONDS),
    ],
    ids=["kill", "stop"],
)
def test_a_rank_that_goes_ends_all_and_leaves_discovery(
    serving: RunningWorker,
    etcd: EtcdServer,
    tmp_path: Path,
    number: signal.Signals,
    codes: tuple[int, ...],
    said: str,
    seconds: float,
) -> None:
    assert etcd.keys("v1/instances/")
    begin = time.monotonic()
    os.kill(serving.ranks()[1], number)
    eventually(lambda: not etcd.keys(), "the keys are gone", seconds)
    code = serving.wait()
    assert time.monotonic() - begin < seconds
    assert code in codes, serving.text()
    text = serving.text()
    host = os.uname().nodename
    # which of the two others is rank 1, only the launcher knows
    expected = [said.format(host=host), said.format(host=host).replace("rank 1", "rank 2")]
    assert sum(text.count("error in serve: " + words) for words in expected) == 1, text
    assert text.count(": error in ") == 1, text
    report = json.loads((tmp_path / "failures" / "backend-rank-0.json").read_text())
    assert report["report"] in text
    assert session_members(serving.process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_the_others_end_when_rank_0_goes(serving: RunningWorker, number: signal.Signals) -> None:
    begin = time.monotonic()
    os.kill(serving.rank_zero(), number)
    assert serving.wait() not in (0, None), serving.text()
    assert time.monotonic() - begin < PROMPT_SECONDS + (HEARTBEAT if number is signal.SIGSTOP else 0)
    assert session_members(serving.process.pid) == []
    if number is signal.SIGSTOP:
        assert "rank 0 on " in serving.text()
        assert "is stopped or stuck: " in serving.text()
