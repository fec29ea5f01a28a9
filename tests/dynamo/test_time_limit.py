# SPDX-License-Identifier: Apache-2.0
"""The end of the job's time as a reason to drain: both kinds of worker learn of it as Slurm announces it, by a variable or by SIGUSR2."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.subprocess import session_members
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_worker_life import Stream

pytestmark = pytest.mark.dynamo
DRAIN = 1
# what an orderly end may take, at the most, with this drain
NEEDED = {"reference": DRAIN + 30, "trtllm": DRAIN + DRAIN + 30 + 60}
# on a busy machine a worker may be ready this late
START_SECONDS = 30
TRTLLM = ("--engine", "trtllm", "--allow-no-gpu", "--max-batch-size", "2")
# a drain in which a busy machine finishes an answer
AMPLE = ("--drain-timeout", "30")
# two workers of one name have one model card
CONTEXT = ("--max-seq-len", "512")
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> Iterator[Start]:
    """Start workers of one kind or the other; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(kind: str, *flags: str, model: Path = small_model_dir, **environment: str) -> RunningWorker:
        if kind == "trtllm":
            paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        words = (*CONTEXT, *(TRTLLM if kind == "trtllm" else ()), "--drain-timeout", str(DRAIN), *flags)
        environment |= {"OMP_NUM_THREADS": "1"}
        workers.append(RunningWorker(tmp_path, etcd, model, 3, *words, name=kind, **environment))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def drained(worker: RunningWorker, reason: str) -> None:
    """See that it has ended in order, and why."""
    assert worker.wait() == 0, worker.text()
    said = worker.text()
    assert said.count(reason) == 1, said
    assert said.index("ready: ") < said.index(reason) < said.index("drain: ") < said.index("exit: done"), said
    assert "error" not in said
    assert session_members(worker.process.pid) == []


def test_workers_end_in_order_before_the_jobs_time_does(start: Start, etcd: EtcdServer) -> None:
    ends = {kind: int(time.time()) + NEEDED[kind] + START_SECONDS for kind in NEEDED}
    workers = {kind: start(kind, SLURM_JOB_END_TIME=str(end)) for kind, end in ends.items()}
    for worker in workers.values():
        worker.ready()
    for kind, worker in workers.items():
        drained(worker, "(SLURM_JOB_END_TIME), in ")
        assert ends[kind] - NEEDED[kind] <= time.time() < ends[kind]
    assert etcd.keys() == [] == etcd.worlds()


def test_a_signal_that_time_is_nearly_up_comes_to_all_ranks_and_more_than_once(
    start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path
) -> None:
    # too short from the start: a warning, and no end
    late = start("reference", *AMPLE, model=model_dir, SLURM_JOB_END_TIME=str(int(time.time()) + 5))
    late.ready()
    assert "warning: the job's time ends at " in late.text()
    other = start("trtllm", *AMPLE, model=model_dir)
    other.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        events = Stream(frontend.port, model_dir.name, 10).events()
        next(events)
        leader = late.rank_zero()
        for worker in (late, other):
            for pid in worker.ranks():
                os.kill(pid, signal.SIGUSR2)
        eventually(lambda: "drain: " in late.text(), "it drains")
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGUSR1)
        assert list(events)[-1] == "[DONE]"
    for worker in (late, other):
        drained(worker, "the launcher says that its time is nearly up (SIGUSR2)")
    assert etcd.keys() == [] == etcd.worlds()
