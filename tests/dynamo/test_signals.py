# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT at any rank, in any phase, whatever its main thread is doing: an orderly end, or one now, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamo_mpi.common.errors import of_signal
from dynamo_mpi.common.subprocess import session_members
from tests.conftest import ROOT, find_mpirun, mpi_environment
from tests.dynamo.marked_command import MarkedCommand
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_worker_life import Stream

pytestmark = pytest.mark.dynamo
Start = Callable[..., RunningWorker]
TERM, INT = signal.SIGTERM, signal.SIGINT
SHIMS = Path(__file__).parent / "programs" / "shims"
# the product's own limits: a signal that ends all now takes two seconds at the most, one that drains an idle worker five
NOW_SECONDS, DRAIN_SECONDS = 6.0, 15.0


class Case(NamedTuple):
    """Which signals go to whom, and what comes of them.

    Args:
        to: ``"0"`` rank 0, ``"n"`` one other rank, ``"all"`` every rank.
        numbers: sent one after the other, the second one once it drains.
        code: of all ranks.
        says: words of the output.
    """

    to: str
    numbers: tuple[signal.Signals, ...]
    code: int
    says: str


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, small_model_dir: Path) -> Iterator[Start]:
    """Start workers of three ranks; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(*flags: str, model: Path = small_model_dir, **environment: str) -> RunningWorker:
        workers.append(RunningWorker(tmp_path, etcd, model, 3, *flags, **environment))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def victims(pids: dict[int, int], to: str) -> list[int]:
    """Return the pids that a case is about."""
    return {"0": [pids[0]], "n": [pids[2]], "all": list(pids.values())}[to]


def by_rank(worker: RunningWorker) -> dict[int, int]:
    """Return the ranks' pids by rank; they exist from their start on."""
    found = {}
    for pid in session_members(worker.process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"dynamo_mpi.worker" in words and words[0].endswith(b"python"):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            (rank,) = (value.partition(b"=")[2] for value in variables if value.startswith(b"OMPI_COMM_WORLD_RANK="))
            found[int(rank)] = pid
    return found


def assert_nothing_is_left(worker: RunningWorker, etcd: EtcdServer) -> None:
    assert session_members(worker.process.pid) == []
    assert etcd.keys() == []
    assert not worker.ready_file.exists()


SERVING = [
    Case("0", (TERM,), 0, "drain: deregistered, 0 requests"),
    Case("n", (TERM,), 0, "got SIGTERM, which goes for all ranks"),
    Case("n", (INT,), 0, "got SIGINT, which goes for all ranks"),
    Case("all", (INT,), 0, "drain: deregistered, 0 requests"),
]


@pytest.mark.landing("n-SIGTERM")
@pytest.mark.parametrize("case", SERVING, ids=lambda case: f"{case.to}-{case.numbers[0].name}")
def test_while_it_serves(case: Case, start: Start, etcd: EtcdServer) -> None:
    worker = start()
    worker.ready()
    begin = time.monotonic()
    for pid in victims(by_rank(worker), case.to):
        os.kill(pid, case.numbers[0])
    assert worker.wait() == case.code, worker.text()
    assert time.monotonic() - begin < DRAIN_SECONDS
    assert worker.text().count(case.says) == 1, worker.text()
    assert "exit: done" in worker.text()
    assert ("which goes for all ranks" in worker.text()) is (case.to == "n"), (
        "what rank 0 knows itself is not sent to it"
    )
    assert_nothing_is_left(worker, etcd)


DRAINING = [
    Case("0", (TERM, TERM), of_signal(TERM), "stopped by SIGTERM"),
    Case("0", (TERM, INT), of_signal(INT), "stopped by SIGINT"),
    Case("n", (TERM, TERM), of_signal(TERM), "stopped by SIGTERM"),
    Case("all", (INT, INT), of_signal(INT), "stopped by SIGINT"),
]


@pytest.mark.landing("n-SIGTERM-SIGTERM")
@pytest.mark.parametrize("case", DRAINING, ids=lambda case: f"{case.to}-{'-'.join(one.name for one in case.numbers)}")
def test_a_second_one_while_it_drains_ends_it_now(
    case: Case, start: Start, etcd: EtcdServer, tmp_path: Path, model_dir: Path
) -> None:
    worker = start("--drain-timeout", "600", model=model_dir)
    worker.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        eventually(lambda: model_dir.name in frontend.models(), "the model is listed")
        events = Stream(frontend.port, model_dir.name, 2000).events()
        next(events)
        pids = victims(by_rank(worker), case.to)
        for pid in pids:
            os.kill(pid, case.numbers[0])
        eventually(lambda: "1 request in flight" in worker.text(), worker.text())
        time.sleep(1.2)  # within a second it would be the same signal, delivered twice
        assert worker.process.poll() is None, worker.text()
        begin = time.monotonic()
        for pid in pids:
            os.kill(pid, case.numbers[1])
        assert worker.wait() == case.code, worker.text()
    assert time.monotonic() - begin < NOW_SECONDS
    assert f"error in drain: {case.says}" in worker.text()
    assert "Traceback" not in worker.text()
    assert_nothing_is_left(worker, etcd)


@pytest.mark.landing("0-15-native", "n-15-collective")
@pytest.mark.parametrize("where", ["native", "collective"])
@pytest.mark.parametrize(("to", "number"), [("0", TERM), ("n", TERM), ("n", INT), ("all", TERM)])
def test_while_it_loads_in_native_code_and_in_a_collective(
    to: str, number: signal.Signals, where: str, start: Start, etcd: EtcdServer
) -> None:
    """The rank that is in native code gets the signal, or one that waits for it in a collective."""
    if to == "all" and where == "native":
        pytest.skip("the same as in a collective: some ranks are here, some there")
    # rank 1 hangs in C; the others wait for it in MPI_Barrier
    sleeper = {"0": 0, "n": 2, "all": 1}[to] if where == "native" else 1
    worker = start(PYTHONPATH=f"{SHIMS}{os.pathsep}{ROOT}", SHIM_SLEEPER=str(sleeper))
    eventually(lambda: worker.text().count(" is in load, ") == 3 or worker.process.poll() is not None, "all load", 60)
    pids = by_rank(worker)
    begin = time.monotonic()
    for pid in victims(pids, to):
        os.kill(pid, number)
    assert worker.wait() == of_signal(number), worker.text()
    assert time.monotonic() - begin < NOW_SECONDS
    assert f"error in load: stopped by {number.name}" in worker.text()
    assert ("which goes for all ranks" in worker.text()) is (to == "n")
    assert_nothing_is_left(worker, etcd)


def test_a_rank_that_is_stuck_in_native_code_does_not_hold_up_the_end(start: Start, etcd: EtcdServer) -> None:
    """Rank 2 hangs on its way out: the engine has closed, and all others are at their end."""
    worker = start(PYTHONPATH=f"{SHIMS}{os.pathsep}{ROOT}", SHIM_LEAVER="2")
    worker.ready()
    begin = time.monotonic()
    os.kill(worker.rank_zero(), TERM)
    assert worker.wait(60) == 124, worker.text()
    assert 15 < time.monotonic() - begin < 40
    text = worker.text()
    assert "error in exit: not all ranks have finished after 20 s" in text
    _, _, stacks = text.partition("where the ranks are:\n")
    assert "hang_in_c" in stacks.partition("rank 2 on ")[2].partition("rank")[0], stacks
    assert_nothing_is_left(worker, etcd)


def test_a_rank_that_hangs_after_its_end_does_not_keep_the_others_in_mpi_finalize(
    start: Start, etcd: EtcdServer
) -> None:
    worker = start(PYTHONPATH=f"{SHIMS}{os.pathsep}{ROOT}", SHIM_FINALIZER="2")
    worker.ready()
    begin = time.monotonic()
    os.kill(worker.rank_zero(), TERM)
    eventually(lambda: "exit: done" in worker.text(), "drained")
    assert worker.wait(60) == 124, worker.text()
    assert 15 < time.monotonic() - begin < 40
    assert_nothing_is_left(worker, etcd)


@pytest.mark.landing("TERM")
@pytest.mark.parametrize(
    "numbers", [(TERM,), (INT,), (TERM, TERM), (INT, INT)], ids=["TERM", "INT", "TERM-TERM", "INT-INT"]
)
def test_a_signal_to_mpirun_leaves_nothing(numbers: tuple[signal.Signals, ...], start: Start, etcd: EtcdServer) -> None:
    """Open MPI's mpirun doesn't hand it on: it ends the ranks itself, by SIGTERM and a quarter of a second later by SIGKILL."""
    worker = start(ETCD_LEASE_TTL="3")
    worker.ready()
    begin = time.monotonic()
    for number in numbers:
        worker.process.send_signal(number)
        time.sleep(0.2)  # so that they are two
    assert worker.wait() == 1, worker.text()
    assert time.monotonic() - begin < NOW_SECONDS
    eventually(lambda: session_members(worker.process.pid) == [], "no process is left", 5)
    eventually(lambda: etcd.keys() == [], "the keys are gone", 12)


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
GRACE_SECONDS = 10.0  # of docker stop


@pytest.mark.landing("worker-0", "mpirun-1")
@pytest.mark.parametrize(("what", "code"), [("worker", 0), ("mpirun", 1), ("local", of_signal(TERM))])
def test_a_container_stops_within_its_grace(
    what: str, code: int, etcd: EtcdServer, tmp_path: Path, small_model_dir: Path
) -> None:
    """SIGTERM to PID 1, which is what is started: a lone rank, mpirun with its ranks, or all of a deployment."""
    if os.geteuid() or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here: needs root")
    ranks = {"worker": 1, "mpirun": 3}.get(what, 0)
    rank = ("-m", "dynamo_mpi.worker", "--model", str(small_model_dir), "--tensor-parallel-size", str(ranks))
    words = {
        "worker": (sys.executable, *rank),
        "mpirun": (find_mpirun(), "-n", str(ranks), sys.executable, *rank),
        "local": (sys.executable, "-m", "dynamo_mpi.cli.main", "local", "--keep"),
    }[what]
    environment = mpi_environment({"ETCD_ENDPOINTS": etcd.url, "ETCD_LEASE_TTL": "3", "DYN_LOG": "error"})
    with MarkedCommand(tmp_path, (*CONTAINER, *words), {} if what == "local" else environment) as container:
        container.wait_for_text("serving until" if what == "local" else "ready: ")
        pid = container.process.pid
        (init,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        begin = time.monotonic()
        os.kill(int(init), TERM)
        assert container.wait() == code, container.err
        assert time.monotonic() - begin < GRACE_SECONDS
        assert container.survivors() == []
        eventually(lambda: etcd.keys() == [], "the keys are gone", 12)
        if what == "worker":
            assert "drain: deregistered" in container.err
