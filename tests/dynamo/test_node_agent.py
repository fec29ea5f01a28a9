# SPDX-License-Identifier: Apache-2.0
"""The agent of a node while its worker serves: it is replaced when it ends or is stopped, never stays, and ends what ranks have started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.subprocess import session_members
from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, http_get, system_port
from tests.fault_traces import find_agent, has_ended, processes_with, remaining

pytestmark = pytest.mark.dynamo
HOST = os.uname().nodename.partition(".")[0]
SHIMS = Path(__file__).parent / "programs" / "shims"
REPLACED = "warning: the node agent has ended (killed or stopped by a signal); started another one"
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> Iterator[Start]:
    """Start a worker of three ranks with a folder for failures; what is left of it is killed."""
    workers: list[RunningWorker] = []

    def begin(**environment: str) -> RunningWorker:
        marked = {"MARK": str(tmp_path), **environment}
        flags = ("--failure-dir", str(tmp_path / "failures"))
        workers.append(RunningWorker(tmp_path, etcd, small_model_dir, 3, *flags, **marked))
        workers[-1].ready()
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def agent_of(folder: Path) -> int:
    """Return the pid of the worker's node agent; 0 for none."""
    return find_agent(processes_with(f"MARK={folder}\0"), HOST)


def assert_one_report(worker: RunningWorker, folder: Path, rank: int) -> None:
    assert worker.text().count(": error in ") == 1, worker.text()
    assert (
        f"rank {rank} on {HOST}" in worker.text().partition(": error in ")[2]
        or f"rank {rank} on {HOST}: error in" in worker.text()
    )
    (report,) = [json.loads(path.read_text()) for path in (folder / "failures").glob("*.json")]
    assert (report["rank"], report["host"], report["cause"]) == (rank, HOST, "disconnect")
    assert remaining(f"MARK={folder}\0") == []


@pytest.mark.landing("0")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_is_reported_where_the_image_has_gone_with_it(
    rank: int, start: Start, tmp_path: Path, etcd: EtcdServer
) -> None:
    """As in a container whose file system is a process of the step, which ends with it (Pyxis with squashfuse)."""
    package = Path(shutil.copytree(ROOT / "dynamo_mpi", tmp_path / "image" / "dynamo_mpi"))
    with (package / "__init__.py").open("a") as file:
        file.write("print('from the image', flush=True)\n")
    worker = start(PYTHONPATH=str(tmp_path / "image"), PYTHONSAFEPATH="1")
    assert worker.text().count("from the image") == 3, worker.text()
    (tmp_path / "image").rename(tmp_path / "gone")
    os.kill(worker.ranks()[rank], signal.SIGKILL)
    assert worker.wait() != 0, worker.text()
    assert_one_report(worker, tmp_path, rank)
    assert len(etcd.keys("dynamo_mpi/v1/failures/")) == 1
    assert etcd.keys() == []


@pytest.mark.landing("0-stopped", "1-killed")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_ends_or_is_stopped_is_replaced(
    number: signal.Signals, rank: int, start: Start, tmp_path: Path, etcd: EtcdServer
) -> None:
    port = system_port()
    worker = start(DYN_SYSTEM_PORT=str(port), DYN_SYSTEM_HOST="127.0.0.1")
    first, before = agent_of(tmp_path), json.loads(http_get(f"http://127.0.0.1:{port}/health")[1])
    os.kill(first, number)
    eventually(lambda: agent_of(tmp_path) not in (0, first), "another agent", 10)
    assert REPLACED in worker.text()
    assert has_ended(first)
    assert worker.process.poll() is None
    # it answers as the one before did
    status, text = http_get(f"http://127.0.0.1:{port}/health")
    after = json.loads(text)
    changing = ("uptime", "rank_silent_seconds")
    assert (status, {**after, **{key: before[key] for key in changing}}) == (200, before)
    begin = time.monotonic()
    os.kill(worker.ranks()[rank], signal.SIGKILL)
    eventually(lambda: not etcd.keys() and not etcd.worlds(), "the keys are gone", 1.5)
    assert worker.wait() == 137, worker.text()
    assert time.monotonic() - begin < 3
    # which rank is the first of the list but 0 is not known
    found = [path.name for path in (tmp_path / "failures").glob("*.json")]
    failed = json.loads((tmp_path / "failures" / found[0]).read_text())["rank"]
    assert (failed == 0) == (rank == 0)
    assert_one_report(worker, tmp_path, failed)


def test_one_that_is_stopped_goes_on_where_rank_0_is_killed(start: Start, tmp_path: Path, etcd: EtcdServer) -> None:
    worker = start()
    os.kill(agent_of(tmp_path), signal.SIGSTOP)
    os.kill(worker.rank_zero(), signal.SIGKILL)
    eventually(lambda: not etcd.keys() and not etcd.worlds(), "the keys are gone", 1.5)
    assert worker.wait() == 137, worker.text()
    assert_one_report(worker, tmp_path, 0)


def test_one_that_is_stopped_does_not_stay_behind_an_orderly_end(start: Start, tmp_path: Path) -> None:
    worker = start()
    os.kill(agent_of(tmp_path), signal.SIGSTOP)
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    assert "error in" not in worker.text()
    assert remaining(f"MARK={tmp_path}\0") == []


@pytest.mark.landing("killed")
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_what_a_rank_has_started_ends_with_it_and_nothing_else_does(how: str, start: Start, tmp_path: Path) -> None:
    started = tmp_path / "started"
    shimmed = {"PYTHONPATH": f"{SHIMS}{os.pathsep}{ROOT}", "SHIM_STARTER": "1", "SHIM_STARTED": str(started)}
    worker = start(**shimmed)
    descendants = [int(pid) for pid in started.read_text().split()]
    rank = next(
        pid for pid in worker.members() if b"OMPI_COMM_WORLD_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    # one that was given all of the rank's variables by somebody else is none of its descendants
    variables = Path(f"/proc/{rank}/environ").read_bytes().rstrip(b"\0").split(b"\0")
    environment = dict(pair.split(b"=", 1) for pair in variables)
    with subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True) as stranger:
        try:
            assert not any(map(has_ended, descendants))
            begin = time.monotonic()
            if how == "killed":
                os.kill(rank, signal.SIGKILL)
            else:
                os.kill(worker.rank_zero(), signal.SIGTERM)
            code = worker.wait()
            assert code == (137 if how == "killed" else 0), worker.text()
            assert time.monotonic() - begin < 8
            eventually(lambda: all(map(has_ended, descendants)), "what it has started has ended", 2)
            assert stranger.poll() is None
        finally:
            stranger.kill()
    if how == "killed":
        assert_one_report(worker, tmp_path, 1)
    assert session_members(worker.process.pid) == []
