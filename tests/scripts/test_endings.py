# SPDX-License-Identifier: Apache-2.0
"""What a launcher meets at its start and at its end: interpreters and numbers that are none, folders that fail it, steps that wait."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import SlurmStepController, Step, start
from tests.dynamo.running import eventually

from .dry_runs import ROOT, STANDINS

SCRIPTS = ROOT / "scripts"


def run(script: str, *words: str, **environment: str) -> tuple[int, str]:
    variables = {"PATH": f"{STANDINS}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment}
    done = subprocess.run([SCRIPTS / script, *words], env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@contextlib.contextmanager
def no_larger_files_than(size: int) -> Iterator[None]:
    """Let writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_interpreter_that_is_not_there_is_reported() -> None:
    code, said = run("stop.sh", PYTHON="/nope/python3")
    assert (code, "PYTHON=/path/to/python3" in said) == (64, True), said


@pytest.mark.parametrize("value", ["abc", "0", "1.5", "-1", "100000", "99999999999999999999"])
def test_a_number_of_nodes_that_is_none_is_not_submitted(value: str) -> None:
    code, said = run("sbatch_disaggregated.sh", "--dry-run", NUM_DECODE_NODES=value)
    assert (code, f"NUM_DECODE_NODES is '{value}'" in said) == (64, True), said
    assert "fix:      correct --decode-nodes or NUM_DECODE_NODES" in said


@pytest.mark.parametrize(
    ("words", "variables", "nodes", "is_kept"),
    [
        ((), {}, 4, False),
        ((), {"DYN_MPI_SPARE_NODES": "2"}, 6, True),
        ((), {"DYN_MPI_SPARE_NODES": "2", "NUM_SPARE_NODES": "1"}, 6, True),
        (("--spare-nodes", "1"), {"NUM_SPARE_NODES": "3"}, 5, True),
        (("--spare=2", "--decode-n", "3"), {}, 7, True),
        (("--spare-nodes=0",), {"DYN_MPI_SPARE_NODES": "2"}, 4, False),
        (("--prefill-nodes", "3", "--decode-workers=2"), {}, 7, False),
        (("--prefill-nodes", "3", "--prefill-nodes=4"), {"NUM_PREFILL_NODES": "x"}, 6, False),
        (("--", "--spare-nodes", "1"), {}, 4, False),
        (("--run-dir", "a b"), {"NUM_DECODE_NODES": "08"}, 10, False),
        (("--role", "agg"), {"NUM_PREFILL_NODES": "x"}, 1, False),
        (("--role=disagg", "--ro", "agg", "--nodes", "3", "--workers=2"), {"NUM_SPARE_NODES": "1"}, 7, True),
        (("--role=agg",), {"NUM_NODES": "3", "NUM_WORKERS": "2"}, 6, False),
        (("--role=agg", "--nodes=n[1-9]"), {"NUM_WORKERS": "2"}, 2, False),
        (("--", "--role", "agg"), {}, 4, False),
    ],
)
def test_a_batch_job_asks_for_the_nodes_that_launch_takes(
    words: tuple[str, ...], variables: dict[str, str], nodes: int, is_kept: bool
) -> None:
    command = [str(SCRIPTS / "sbatch_disaggregated.sh"), "--dry-run", "--", *words]
    environ = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert f"sbatch --nodes={nodes} --gpus-per-node=4 " in done.stdout
    assert (" --no-kill " in done.stdout) == is_kept


@pytest.mark.parametrize(
    "words", [("--spare-nodes", "-1"), ("--spare-nodes=x",), ("--gpus-per-node", "0"), ("--role", "both")]
)
def test_a_flag_s_value_that_is_none_is_not_submitted(words: tuple[str, ...]) -> None:
    code, said = run("sbatch_disaggregated.sh", "--dry-run", "--", *words)
    assert (code, f"flag {words[0].partition('=')[0]} is '" in said, "  fix: " in said) == (64, True, True), said


SCONTROL = """#!/bin/sh
case "$1 $2" in
"requeue 12") [ -z "$NO_REQUEUE" ] || { echo "Requested operation is presently disabled" >&2; exit 1; } ;;
"--oneliner show") echo "JobId=12 ExcNodeList=(null) Requeue=1" ;;
"update jobid=12") ;;
*) echo "stand-in for scontrol: unknown: $*" >&2; exit 1 ;;
esac
echo "$*" >> "$CALLS"
"""


@pytest.mark.parametrize("named", ["variable", "--run-dir X", "--run-dir=X", "of the worker"])
@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_batch_job_asks_for_its_requeue(named: str, is_allowed: bool, tmp_path: Path) -> None:
    scripts, run_dir, calls = tmp_path / "checkout" / "scripts", tmp_path / "run dir", tmp_path / "calls"
    for folder in (scripts, run_dir, tmp_path / "bin"):
        folder.mkdir(parents=True)
    # in the launcher's place: it has left a node out
    for path, content in (
        (scripts / "srun_disaggregated.sh", "#!/bin/sh\nexit 75\n"),
        (tmp_path / "bin" / "scontrol", SCONTROL),
    ):
        path.write_text(content)
        path.chmod(0o755)
    (run_dir / "excluded.json").write_text('{"nodes": [{"node": "n3"}]}')
    words = {"--run-dir X": ("--run-dir", str(run_dir)), "--run-dir=X": (f"--run-dir={run_dir}",)}.get(named, ())
    if named == "of the worker":
        words = ("--", "--run-dir", str(tmp_path))
    variables = {"SLURM_JOB_ID": "12", "DYN_MPI_CHECKOUT": str(scripts.parent), "CALLS": str(calls)}
    variables |= {} if words and words[0] != "--" else {"DYN_MPI_RUN_DIR": str(run_dir)}
    variables |= {} if is_allowed else {"NO_REQUEUE": "1"}
    code, said = run("sbatch_disaggregated.sh", *words, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables)
    asked = calls.read_text().splitlines()
    assert code == 75, said
    assert ("update jobid=12 ExcNodeList=n3" in asked) == is_allowed, said
    assert ("submit it again with --exclude=n3" in said) == (not is_allowed), said


@pytest.mark.parametrize(("spares", "is_kept"), [("0", False), ("", False), ("08", True), ("2", True)])
def test_a_batch_job_outlives_a_node_only_with_spare_nodes(spares: str, is_kept: bool) -> None:
    words = [str(SCRIPTS / "sbatch_disaggregated.sh"), "--dry-run"]
    variables = {"PATH": os.environ["PATH"], "NUM_SPARE_NODES": spares}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert ("DYN_MPI_NO_KILL=1 sbatch" in done.stdout, " --no-kill " in done.stdout) == (is_kept, is_kept)
    assert "#SBATCH --no-kill" not in (SCRIPTS / "sbatch_disaggregated.sh").read_text()


@pytest.mark.parametrize("value", ["abc", "1.5", "-1", "99999999999999999999"])
def test_a_number_of_spare_nodes_that_is_none_is_not_submitted(value: str) -> None:
    code, said = run("sbatch_disaggregated.sh", "--dry-run", NUM_SPARE_NODES=value)
    assert (code, f"NUM_SPARE_NODES is '{value}'" in said) == (64, True), said


def test_a_folder_that_fails_the_launcher_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "n[1-4]", "NUM_PREFILL_NODES": "2", "NUM_DECODE_NODES": "2"}
    # the lock file still fits; Python would keep the beginning of a compiled module
    job["PYTHONDONTWRITEBYTECODE"] = "1"
    with no_larger_files_than(256):
        code, said = run("srun_disaggregated.sh", MODEL_PATH="/m", DYN_MPI_RUN_DIR=str(tmp_path), **job)
    assert (code, "file system error" in said, "Traceback" in said) == (70, True, False), said


def test_the_logs_of_the_deployment_before_are_laid_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = RunDir(folder)
    first.log("decode-0").write_text("ready\n")
    first.close()
    second = RunDir(folder)
    assert sorted(path.name for path in second.logs.iterdir()) == ["decode-0.log.old"]
    second.close()


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Step]:
    """A step whose srun lives, and which Slurm doesn't list."""
    monkeypatch.setenv("PATH", f"{STANDINS}:{os.environ['PATH']}")
    step = start(Command("decode-0", "dynmpi-x-decode-0", (("sleep", "60"),)), os.environ, tmp_path / "log")
    yield step
    step.child.kill()


def test_a_step_that_waits_for_busy_nodes_is_ended_by_its_srun(waiting: Step) -> None:
    SlurmStepController("1234").signal([waiting])
    eventually(lambda: waiting.child.exit_code() is not None, "srun has ended", 10)
    assert waiting.child.exit_code() == 128 + signal.SIGTERM


def test_where_slurm_does_not_answer_the_srun_is_asked(waiting: Step) -> None:
    SlurmStepController("4321").signal([waiting])  # the stand-in fails: it knows another job alone
    eventually(lambda: waiting.child.exit_code() is not None, "srun has ended", 10)
