# SPDX-License-Identifier: Apache-2.0
"""A file that is to go through another user's link: the refusal is a warning or an error, with what to do."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.failure import Failure
from dynamo_mpi.common.log_record import Level
from dynamo_mpi.common.log_writer import LogFormat, LogWriter
from dynamo_mpi.common.own_files import remove_own
from dynamo_mpi.runtime import worker_hooks
from dynamo_mpi.runtime.worker_hooks import LeaderHooks
from dynamo_mpi.supervisor.failure_reports import remove_stale_failure_files, write_failure
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.metrics import MetricsFile
from dynamo_mpi.telemetry.trace_writer import write_timeline
from tests.unit.neighbour import NOBODY, as_neighbour, needs_root
from tests.unit.test_neighbours_files import Warnings, write_ready_file
from tests.unit.test_timeline_writer import writer_of
from tests.unit.timelines import start_of

pytestmark = needs_root


@pytest.fixture
def link(shared: Path, tmp_path: Path) -> Path:
    """Another user's link to a folder of this user."""
    as_neighbour(lambda: os.symlink(tmp_path, shared / "link"))
    return shared / "link"


def refusal(link: Path) -> str:
    return f"{link} is a link of user {NOBODY}; name the folder itself: {link.readlink()}"


def test_failure_files_are_refused_with_a_warning(
    link: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert remove_stale_failure_files(link, "w") == f"no failure files: {refusal(link)}"
    write_failure(Rendezvous("n1", failure_dir=str(link), label="w"), Failure(0, 70, "died"), "n1")
    assert f"warning: the failure file {link}/w-rank-0.json can't be written: {refusal(link)}" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_stale_ready_file_or_timeline_is_warned_of(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(worker_hooks, "WorldStatus", stop)
    log = Warnings()
    context: Any = SimpleNamespace(
        log=log, agent=None, phases=SimpleNamespace(current="load", on_phase=lambda hook: None)
    )
    settings: Any = SimpleNamespace(ready_file=link / "x.json", timeline=link / "x.html")
    with pytest.raises(InterruptedError):
        LeaderHooks(context, None, None).add_status_hooks(settings)
    assert log.said == [
        f"a ready file of an earlier start, {link}/x.json, can't be removed: {refusal(link)}",
        f"a timeline of an earlier start, {link}/x.html, can't be removed: {refusal(link)}",
    ]


def test_a_file_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert [remove_own(tmp_path / name) for name in ("x", "none/x", "file/x")] == ["", "", ""]


def test_ready_metrics_and_log_files_say_what_to_do(link: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert write_ready_file(link / "x.json") == [f"the ready file {link}/x.json can't be written: {refusal(link)}"]
    said: list[str] = []
    metrics = MetricsFile(link / "x.prom", lambda: "a 1\n", said.append)
    metrics.on_exit(0)
    metrics.on_phase("exit")  # its thread ends
    assert said == [f"the metrics file {link}/x.prom can't be written: {refusal(link)}"]
    writer = LogWriter(LogFormat())
    writer.open_file(str(link), "w", 0)
    writer.emit(0, "n1", "one", Level.INFO)
    assert f"can't be written, so there is none: {refusal(link)}" in capfd.readouterr().err


def test_timelines_say_what_to_do(link: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer_of(link / "start.html").on_exit(0)
    assert f"the timeline {link}/start.html can't be written: {refusal(link)}" in capfd.readouterr().err
    write_timeline(tmp_path / "good.html", [start_of(1)])
    assert main(["timeline", str(tmp_path / "good.html"), "-o", str(link / "x.html")]) == ExitCode.USAGE
    assert f"fix:      name the folder itself: {tmp_path}" in capfd.readouterr().err
