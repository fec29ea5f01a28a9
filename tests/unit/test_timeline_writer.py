# SPDX-License-Identifier: Apache-2.0
"""What rank 0 writes of the start, and that nothing which hinders it keeps the worker."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.discovery.records import RecordedLayout, WorkerRecord
from dynamo_mpi.supervisor.progress import ProgressTracker
from dynamo_mpi.supervisor.supervisor import WorldSupervisor
from dynamo_mpi.telemetry import trace_writer
from dynamo_mpi.telemetry.startup_trace import read_traces
from dynamo_mpi.telemetry.trace_writer import TraceWriter, perfetto_path, remove_stale_timeline
from tests.dynamo.running import eventually

RECORD = WorkerRecord(
    role="agg",
    engine="reference",
    namespace="n",
    component="backend",
    endpoint="dyn://n.backend.generate",
    model="a\u200bmodel",
    phase="preflight",
    layout=RecordedLayout(2, 1, 1, 1, False, 2, 1),
    hosts=("n0", "n1"),
    contract=None,
    dynamo_mpi="0",
    trtllm=None,
    job="7",
    step=None,
    started=0.0,
    pid=1,
    host="n0",
    attempt=3,
)


def writer_of(path: Path, *failures: Failure) -> TraceWriter:
    phases = PhaseTracker()
    phases.begin("load")
    guard = SimpleNamespace(failures=failures, tracker=ProgressTracker(["n0", "n1"], phases))
    return TraceWriter(path, RECORD, cast(WorldSupervisor, guard), RankLogger(0, "n0"))


@pytest.mark.parametrize(
    ("failures", "outcome", "first_rank"),
    [
        ((), "ended", None),
        ((Failure(1, 70, "Traceback (most recent call last):\n  x\nOSError: a\x00b\n", phase="load"),), "failed", 1),
        (
            (Failure(0, 143, "stopped by SIGTERM\n  do: x", DetectedBy.SIGNAL, "load"), Failure(1, 70, "y")),
            "stopped",
            None,
        ),
    ],
)
def test_the_outcome_is_in_the_timeline(
    tmp_path: Path, failures: tuple[Failure, ...], outcome: str, first_rank: int | None
) -> None:
    path = tmp_path / "start.html"
    writer_of(path, *failures).on_exit(0)
    (start,) = read_traces(path)
    assert (start.outcome, start.attempt, start.job, start.model) == (outcome, 3, "7", "a\ufffdmodel")
    if failures:
        assert start.failure is not None
        assert start.failure.rank == first_rank
        assert start.failure.error in ("OSError: a\ufffdb", "stopped by SIGTERM")


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    writer = writer_of(tmp_path / "file" / "start.html")
    writer.on_ready()
    writer.on_exit(0)
    said = capfd.readouterr().err
    assert f"warning: the timeline {tmp_path}/file/start.html can't be written: Not a directory" in said
    assert "Traceback" not in said


def test_a_file_system_that_hangs_keeps_neither_requests_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, written = threading.Event(), list[str]()

    def hang(path: Path, starts: list[Any]) -> None:
        go_on.wait(60)
        written.append(starts[0].outcome)

    monkeypatch.setattr(trace_writer, "write_timeline", hang)
    monkeypatch.setattr(trace_writer, "_END_SECONDS", 0.05)
    writer = writer_of(tmp_path / "start.html")
    writer.on_ready()
    writer.on_exit(0)
    assert written == []
    go_on.set()
    eventually(lambda: len(written) == 2, "both are written")
    # whichever came first: the last word is that of the end
    assert written[-1] == "ended"


def test_what_an_earlier_start_has_left_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "start.html"
    writer_of(path).on_exit(0)
    assert path.exists()
    assert perfetto_path(path).exists()
    remove_stale_timeline(path)
    remove_stale_timeline(path)
    assert list(tmp_path.iterdir()) == []
