# SPDX-License-Identifier: Apache-2.0
"""Real workers draw their start: ready, ended in order, stopped and failed while loading."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode, of_signal
from dynamo_mpi.common.phases import PROCESS_START
from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME
from dynamo_mpi.telemetry.startup_summary import describe_failure
from dynamo_mpi.telemetry.startup_trace import StartupTrace, read_traces
from dynamo_mpi.telemetry.trace_writer import perfetto_path
from tests.dynamo.running import EtcdServer, RunningWorker, eventually

pytestmark = pytest.mark.dynamo
RANKS = 3


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Callable[..., RunningWorker]]:
    """Start a worker that draws into this test's folder."""
    workers: list[RunningWorker] = []

    def begin(*flags: str, **environment: str) -> RunningWorker:
        page = tmp_path / "pages/start.html"
        workers.append(RunningWorker(tmp_path, etcd, model_dir, RANKS, "--timeline", str(page), *flags, **environment))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def drawn(folder: Path) -> StartupTrace | None:
    """Return what has been drawn, in the page and in the trace alike."""
    page = folder / "pages/start.html"
    if not perfetto_path(page).exists():
        return None
    (start,) = read_traces(page)
    return start if (start,) == read_traces(perfetto_path(page)) else None


def test_a_start_is_drawn_when_it_is_ready_and_at_its_end(start: Callable[..., RunningWorker], tmp_path: Path) -> None:
    worker = start()
    leader = worker.rank_zero()
    first = eventually(lambda: drawn(tmp_path), "the page")
    assert (first.outcome, first.failure, first.attempt, len(first.ranks)) == ("ready", None, 1, RANKS)
    assert first.ready is not None
    assert first.origin < first.ready <= first.written
    for rank in first.ranks:
        phases = [span.phase for span in rank.spans]
        assert phases[:5] == [PROCESS_START, "environment", "mpi_init", "preflight", "load"]
        load = rank.spans[4]
        assert load.local is not None
        assert load.total is not None
        assert 0 < load.local <= load.total
    os.kill(leader, signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    last = drawn(tmp_path)
    assert last is not None
    assert (last.outcome, last.ready, last.failure) == ("ended", first.ready, None)
    assert [span.phase for span in last.ranks[0].spans][-2:] == ["drain", "exit"]
    assert not [name for name in os.listdir(tmp_path / "pages") if name.startswith(".")]


def test_a_rank_that_dies_while_loading_is_marked(start: Callable[..., RunningWorker], tmp_path: Path) -> None:
    worker = start(DYN_MPI_FAULT="rank2:load+0.05:kill", DYN_MPI_ALLOW_FAULTS="1")
    assert worker.wait() != 0
    found = drawn(tmp_path)
    assert found is not None, worker.text()
    assert (found.outcome, found.ready) == ("failed", None)
    assert found.failure is not None
    assert (found.failure.rank, found.failure.phase, found.failure.exit_code) == (2, "load", ExitCode.ENGINE)
    assert (
        describe_failure(found)
        == f"rank 2 on {found.ranks[2].host} died: its process exited without reporting an error"
    )
    assert found.ranks[2].spans[-1].phase == "load"


@pytest.mark.full
def test_a_start_that_is_stopped_is_drawn_as_far_as_it_came(
    start: Callable[..., RunningWorker], etcd: EtcdServer, tmp_path: Path
) -> None:
    worker = start(DYN_MPI_FAULT="rank1:load:slow=30", DYN_MPI_ALLOW_FAULTS="1")
    eventually(lambda: [world.phase for world in etcd.worlds()] == ["load"], "it loads")
    leader = worker.members()[0]
    os.kill(leader, signal.SIGTERM)
    code = worker.wait()
    found = drawn(tmp_path)
    assert found is not None, worker.text()
    assert (code, found.outcome, found.ready) == (of_signal(signal.SIGTERM), "stopped", None)
    assert found.failure is not None
    assert "SIGTERM" in found.failure.error


@pytest.mark.full
def test_a_start_that_its_probe_refuses_is_drawn(start: Callable[..., RunningWorker], tmp_path: Path) -> None:
    worker = start(
        "--probe", "fabric", "--probe-strict", DYN_MPI_FAULT="rank1:hardware_check:corrupt", DYN_MPI_ALLOW_FAULTS="1"
    )
    assert worker.wait() == ExitCode.TEMPORARY, worker.text()
    found = drawn(tmp_path)
    assert found is not None
    assert found.failure is not None
    assert (found.outcome, found.ready, found.failure.phase) == ("failed", None, "hardware_check")


@pytest.mark.full
def test_a_load_that_fails_in_order_is_drawn(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model, ignore=shutil.ignore_patterns(WEIGHTS_NAME))
    (model / WEIGHTS_NAME).write_bytes(bytes(2**24))
    worker = RunningWorker(tmp_path, etcd, model, 1, "--timeline", str(tmp_path / "pages/start.html"))
    try:
        assert worker.wait() == ExitCode.NO_MODEL, worker.text()
    finally:
        worker.stop()
    found = drawn(tmp_path)
    assert found is not None
    assert (found.outcome, found.ready) == ("failed", None)
    assert found.failure is not None
    assert (found.failure.rank, found.failure.phase, found.failure.exit_code) == (0, "load", ExitCode.NO_MODEL)
    assert "is not a usable weights file" in found.failure.error
