# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi timeline``: which files it finds, and what it makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.deploy.timeline import Milestones
from dynamo_mpi.telemetry.startup_trace import read_traces
from dynamo_mpi.telemetry.trace_writer import write_timeline
from tests.conftest import ROOT
from tests.unit.timelines import BEGAN, start_of


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a deployment, as its launcher and its workers leave it."""
    folder = tmp_path / "dynamo_mpi-1"
    for name, began in (("decode-0", 2.0), ("prefill-10", 1.0), ("prefill-2", 1.0)):
        start = replace(start_of(4, name=name, began=BEGAN + began), role=name.partition("-")[0])
        write_timeline(folder / "timeline" / f"{name}.html", [start])
    milestones = Milestones(folder / "timeline" / "launch.json", "launch")
    with milestones.step("check"):
        pass
    with pytest.raises(ZeroDivisionError), milestones.step("services"):
        raise ZeroDivisionError
    return folder


def names(path: Path) -> list[str]:
    return [start.name for start in read_traces(path)]


def test_a_deployment_is_one_page_its_services_first_and_prefill_before_decode(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.html"
    assert main(["timeline", "--run-dir", str(run_dir), "-o", str(out)]) == 0
    assert names(out) == ["launch", "prefill-2", "prefill-10", "decode-0"]
    assert capsys.readouterr().out == ""
    assert main(["timeline", str(out), "-o", str(tmp_path / "all.json")]) == 0
    assert names(tmp_path / "all.json") == names(out)
    (launch, *_) = read_traces(out)
    assert [span.phase for span in launch.ranks[0].spans] == ["check", "services"]
    assert abs(launch.origin - time.time()) < 60


def test_the_only_folder_with_timelines_is_found(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "DYN_MPI_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["timeline"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("launch\ncheck ")
    assert written.count("DeepSeek-R1: ready after") == 3
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert main(["timeline", "--output", "trace"]) == 0
    assert len(json.loads(capsys.readouterr().out)["dynamo_mpi"]["workers"]) == 4
    monkeypatch.delenv("SLURM_JOB_ID")
    (tmp_path / "dynamo_mpi-2").symlink_to(run_dir)
    assert main(["timeline"]) == ExitCode.USAGE
    assert "2 folders of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["missing.html"], ExitCode.USAGE, "missing.html can't be read: No such file"),
        (["--run-dir", "."], ExitCode.USAGE, "is no run folder"),
        (["a.html", "--run-dir", "."], ExitCode.USAGE, "both files and --run-dir"),
        (["other.html"], ExitCode.DATA, "other.html is no timeline: a page without a timeline's data"),
        (["good.html", "-o", "nowhere/x.html"], ExitCode.USAGE, "nowhere/x.html can't be written: No such file"),
        (["good.html", "--output", "pdf"], ExitCode.USAGE, "invalid choice: 'pdf'"),
        ([], ExitCode.USAGE, "no ./dynamo_mpi-* of"),
    ],
)
def test_what_cannot_be_is_said(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "DYN_MPI_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "other.html").write_text("<html></html>")
    write_timeline(tmp_path / "good.html", [start_of(1)])
    assert main(["timeline", *words]) == code
    assert said in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(run_dir: Path) -> None:
    command = f"{sys.executable} -m dynamo_mpi.cli.main timeline --run-dir {run_dir} --output html | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == ("<!DOCTYPE html>\n", "")


def test_it_needs_the_standard_library_alone(run_dir: Path) -> None:
    """Apart from PyYAML it may be all that a login node has: -S hides what is installed."""
    words = [sys.executable, "-S", "-m", "dynamo_mpi.cli.main", "timeline", "--run-dir", str(run_dir)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "slowest in load" in done.stdout
