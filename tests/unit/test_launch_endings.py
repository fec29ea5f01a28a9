# SPDX-License-Identifier: Apache-2.0
"""How a deployment's steps are ended under Slurm, whatever state Slurm is in: real processes, and stand-ins for its two commands."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.deploy import steps as slurm_steps
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import SlurmStepController, Step, StepEnd, end_of_job, start
from tests.dynamo.running import eventually
from tests.unit.slurm_commands import SlurmCommands


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Step]:
    begun = start(Command("decode-0", "dynmpi-x-decode-0", (("sleep", "600"),)), os.environ, tmp_path / "log")
    yield begun
    begun.child.kill()


def test_a_step_is_signalled_by_its_id_and_its_srun_left_alone(slurm: SlurmCommands, step: Step) -> None:
    slurm.lists("7.3|dynmpi-x-decode-0", "7.4|dynmpi-y-decode-0")
    SlurmStepController("7").signal([step])
    assert slurm.asked == ["--signal=TERM 7.3"]
    SlurmStepController("7").cancel([step])
    assert slurm.asked[1:] == ["7.3"]
    assert step.child.exit_code() is None


def test_a_cancelled_step_that_slurm_still_lists_is_not_taken_for_the_next(slurm: SlurmCommands, step: Step) -> None:
    slurm.lists("7.3|dynmpi-x-decode-0")
    steps = SlurmStepController("7")
    steps.cancel([step])
    # as a step with a lost node, until the job ends
    slurm.lists("7.3|dynmpi-x-decode-0", "7.9|dynmpi-x-decode-0")
    steps.signal([step])
    assert slurm.asked == ["7.3", "--signal=TERM 7.9"]
    steps.cancel([step])
    assert slurm.asked[2:] == ["7.9"], "Slurm has ended 7.3 already"
    assert step.child.exit_code() is None


def test_a_step_whose_next_start_waits_is_ended_by_its_srun(slurm: SlurmCommands, step: Step) -> None:
    slurm.lists("7.3|dynmpi-x-decode-0")
    steps = SlurmStepController("7")
    steps.cancel([step])
    steps.signal([step])
    assert slurm.asked == ["7.3"]
    assert step.child.popen.wait(10) == -signal.SIGTERM


def test_a_launcher_that_waits_for_a_lost_node_is_killed(slurm: SlurmCommands, tmp_path: Path) -> None:
    words = ("sh", "-c", "trap '' TERM; echo begun; sleep 600 & wait; wait; sleep 600")
    hung = start(Command("decode-0", "dynmpi-x-decode-0", (words,)), os.environ, tmp_path / "log")
    eventually(lambda: "begun" in hung.last_words(), "it ignores SIGTERM", 10)
    slurm.lists("7.3|dynmpi-x-decode-0")
    end = StepEnd(hung, SlurmStepController("7"), 0.3)
    assert slurm.asked == ["7.3"]
    assert not end.poll()
    eventually(end.poll, "it has ended", 10)
    assert (hung.child.exit_code(), hung.child.members()) == (137, [])


@pytest.mark.parametrize("answers", [True, False])
def test_a_step_that_slurm_does_not_name_is_ended_by_its_srun(slurm: SlurmCommands, step: Step, answers: bool) -> None:
    if not answers:
        slurm.fails("Unable to contact slurm controller (connect failure)")
    SlurmStepController("7").signal([step])
    assert step.child.popen.wait(10) == -signal.SIGTERM
    assert slurm.asked == []


def test_a_hung_slurm_keeps_the_launcher_only_for_seconds(
    slurm: SlurmCommands, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexec sleep 600\n")
    assert slurm_steps._CANCEL_SECONDS <= 5
    monkeypatch.setattr(slurm_steps, "_CANCEL_SECONDS", 0.3)
    began = time.monotonic()
    SlurmStepController("7").cancel([step])
    assert time.monotonic() < began + 5
    assert step.child.popen.wait(10) == -signal.SIGTERM


def test_slurm_is_asked_when_the_jobs_time_ends(slurm: SlurmCommands) -> None:
    assert end_of_job("7") == "1800000000"
    slurm.fails("Invalid job id specified")
    assert end_of_job("8") == ""


def left_by_a_killed_launcher(tmp_path: Path, slurm: SlurmCommands) -> Path:
    """Return a link to the folder: its user may come to it by another path."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.describe({"job_id": "7", "steps": ["dynmpi-x-services", "dynmpi-x-decode-0"]})
    os.close(run_dir._lock)
    slurm.lists("7.3|dynmpi-x-decode-0", "7.4|dynmpi-y-decode-0")
    link = tmp_path / "link"
    link.symlink_to(run_dir.path)
    return link


def test_down_cancels_the_steps_of_a_killed_launcher_and_no_others(
    tmp_path: Path, slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_by_a_killed_launcher(tmp_path, slurm)
    assert main(["down", str(folder)]) == 0
    assert slurm.asked == ["7.3"]
    assert "cancelling 7.3" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "logs", "ready", "timeline"]


def test_down_does_not_report_as_ended_what_slurm_does_not_list(
    tmp_path: Path, slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_by_a_killed_launcher(tmp_path, slurm)
    slurm.fails("Unable to contact slurm controller (connect failure)")
    assert main(["down", str(folder), "--timeout", "0.1"]) == ExitCode.DEADLINE
    assert "Slurm doesn't list the steps of job 7" in capsys.readouterr().err
    assert json.loads((folder / "deployment.json").read_text())["job_id"] == "7"


def test_down_of_a_job_that_has_long_ended(tmp_path: Path, slurm: SlurmCommands) -> None:
    folder = left_by_a_killed_launcher(tmp_path, slurm)
    slurm.fails("Invalid job id specified")
    assert main(["down", str(folder)]) == 0
    assert slurm.asked == []
