# SPDX-License-Identifier: Apache-2.0
"""What another user put where this user's commands and ranks look: nothing of it is read, followed, waited for, printed raw or obeyed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.log_writer import LogFile
from dynamo_mpi.common.subprocess import LoggedProcess
from dynamo_mpi.common.worker_process import process_start
from dynamo_mpi.deploy.services import curl_line
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import MpirunStepController, Step
from dynamo_mpi.runtime.worker_record import ReadyFile
from dynamo_mpi.supervisor.failure_reports import remove_stale_failure_files
from dynamo_mpi.telemetry.metrics import MetricsFile
from tests.unit.board import Board
from tests.unit.model_zoo import ZOO
from tests.unit.neighbour import NOBODY, as_neighbour, needs_root, within
from tests.unit.slurm_commands import SlurmCommands
from tests.unit.test_status_command import describe, serve

Run = Callable[..., tuple[int, str, str]]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b1m\x7f"
STEPS = {"job_id": "7", "steps": ["dynmpi-x-decode-0", "python"]}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def begin(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return begin


@pytest.fixture
def slurm(slurm: SlurmCommands) -> SlurmCommands:
    slurm.lists("7.3|dynmpi-x-decode-0", "7.4|python")
    return slurm


@pytest.fixture
def here(shared: Path, clean_board: Board, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared folder, as the current one, and nothing in the environment."""
    monkeypatch.delenv("ETCD_ENDPOINTS")
    monkeypatch.chdir(shared)
    return shared


def plant_deployment(folder: Path, url: str = "") -> None:
    """Make a run folder whose launcher has ended."""
    folder.mkdir(mode=0o755)
    worker = {"name": HOSTILE, "role": HOSTILE, "nodes": [HOSTILE], "ranks": 1, "step": "x"}
    content = {"schema": 1, "pid": 1, "host": "h", **STEPS, "workers": [worker]}
    (folder / "deployment.json").write_text(json.dumps(content))
    (folder / "services.json").write_text(json.dumps({"url": HOSTILE, "environment": {"ETCD_ENDPOINTS": url}}))
    (folder / "lock").write_text("")


# M1: a deployment.json of another user


@needs_root
def test_a_neighbours_deployment_ends_no_step(here: Path, run: Run, slurm: SlurmCommands) -> None:
    as_neighbour(lambda: plant_deployment(here / "dynamo_mpi-x"))
    code, _, err = run("down", "--timeout", "1")
    assert (code, slurm.asked, "no deployment runs" in err) == (ExitCode.USAGE, [], True), err
    assert sorted(os.listdir(here / "dynamo_mpi-x")) == ["deployment.json", "lock", "services.json"]


@needs_root
@pytest.mark.parametrize("verb", ["down", "status", "wait", "timeline"])
def test_a_neighbours_folder_is_not_used(here: Path, run: Run, slurm: SlurmCommands, verb: str) -> None:
    as_neighbour(lambda: plant_deployment(here / "dynamo_mpi-x"))
    code, out, err = run(verb, "--run-dir", "dynamo_mpi-x", *(("--timeout", "1") if verb in ("down", "wait") else ()))
    assert (code, out, slurm.asked) == (ExitCode.NOT_AUTHORISED, "", []), err
    assert f"belongs to user {NOBODY}" in err
    assert sorted(os.listdir(here / "dynamo_mpi-x")) == ["deployment.json", "lock", "services.json"]


@needs_root
def test_a_neighbours_folder_hides_no_own_one(here: Path, run: Run) -> None:

    def plant() -> None:
        for name in ("a", "\x1b[2J", "z"):
            plant_deployment(here / f"dynamo_mpi-{name}")

    as_neighbour(plant)
    own = describe(here / "dynamo_mpi-own")
    assert run("down", "--dry-run")[:2] == (
        0,
        f"the deployment in {own.path}: prefill-0, decode-0, and its services\n",
    )
    own.close()


@needs_root
def test_doctor_asks_no_etcd_of_a_neighbour(here: Path, run: Run, clean_board: Board) -> None:
    as_neighbour(lambda: plant_deployment(here / "dynamo_mpi-x", clean_board.url))
    _, out, _ = run("doctor", "--run-dir", "dynamo_mpi-x", "--only", "services")
    assert f"belongs to user {NOBODY}" in out
    assert clean_board.url not in out


def test_only_steps_of_launch_are_cancelled(tmp_path: Path, run: Run, slurm: SlurmCommands) -> None:
    run_dir = describe(tmp_path / "run", **STEPS)
    os.close(run_dir._lock)
    code, _, err = run("down", "--run-dir", str(run_dir.path), "--timeout", "5")
    assert (code, slurm.asked) == (0, ["7.3"]), err


@pytest.mark.parametrize("steps", ["python", 7, [{}], None, {"python": 1}])
def test_steps_that_are_no_list_end_nothing(tmp_path: Path, run: Run, slurm: SlurmCommands, steps: Any) -> None:
    run_dir = describe(tmp_path / "run", job_id="7", steps=steps)
    os.close(run_dir._lock)
    assert (run("down", "--run-dir", str(run_dir.path), "--timeout", "5")[0], slurm.asked) == (0, [])


def test_advice_is_one_word_in_a_shell(tmp_path: Path, run: Run, clean_board: Board) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    run_dir = describe(tmp_path / "it's; touch x\x1b[2J", pid=gone.pid)
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": clean_board.url})
    os.close(run_dir._lock)
    _, out, _ = run("status", "--run-dir", str(run_dir.path))
    line = next(line for line in out.splitlines() if "its launcher was killed" in line)
    assert "\x1b" not in out
    command = line.partition("dynamo-mpi ")[2].removesuffix(" clears up")
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    assert words.stdout.decode().split("\0")[:-1] == ["down", "--run-dir", str(run_dir.path)]


# M2: the own run folder, on a way that others decide


@needs_root
@pytest.mark.parametrize("verb", ["down", "status", "wait", "timeline"])
def test_a_neighbours_link_leads_nowhere(here: Path, tmp_path: Path, run: Run, verb: str) -> None:
    own = describe(tmp_path / "run")
    as_neighbour(lambda: os.symlink(own.path, here / "dynamo_mpi-x"))
    limit = ("--timeout", "1") if verb in ("down", "wait") else ()
    for words in ((), ("--run-dir", "dynamo_mpi-x")):
        code, _, err = run(verb, *words, *limit)
        assert code in (ExitCode.USAGE, ExitCode.UNAVAILABLE, ExitCode.DEADLINE), err
        assert not own.stop_requested()
    assert f"is a link of user {NOBODY}" in err
    assert f"name the folder itself: {own.path}" in err
    own.close()


@needs_root
def test_a_run_folder_where_everybody_may_write(here: Path, run: Run) -> None:
    own = describe(here / "dynamo_mpi-x")
    here.chmod(0o777)
    code, _, err = run("down", "--run-dir", "dynamo_mpi-x", "--timeout", "1")
    assert (code, "has no sticky bit" in err) == (ExitCode.USAGE, True), err
    assert not own.stop_requested()
    code, _, err = run("launch", "--run-dir", str(here / "new"), "--hostfile", "/dev/null")
    assert code == ExitCode.USAGE
    here.chmod(0o1777)
    assert run("down", "--run-dir", "dynamo_mpi-x", "--dry-run")[0] == 0
    own.close()


@pytest.mark.parametrize("words", [("down", "--timeout", "1"), ("status",), ("timeline",)])
def test_an_own_folder_that_others_can_write_is_named(here: Path, run: Run, words: tuple[str, ...]) -> None:
    own = describe(here / "dynamo_mpi-x")
    (own.path / "timeline" / "launch.json").touch()
    own.path.chmod(0o770)
    code, _, err = run(*words)
    assert (code, f"chmod 700 {own.path}" in err) == (ExitCode.USAGE, True), err
    assert not own.stop_requested()
    own.close()


def test_an_own_folder_without_a_deployment_is_not_named(here: Path, run: Run) -> None:
    (here / "dynamo_mpi-x").mkdir(mode=0o770)
    (here / "dynamo_mpi-x").chmod(0o770)
    assert "no deployment runs" in run("down", "--timeout", "1")[2]


def test_a_group_shares_the_parent(shared: Path, run: Run) -> None:
    """A project's folder, as it is on many clusters."""
    shared.chmod(0o2770)
    own = describe(shared / "dynamo_mpi-x")
    assert run("down", "--run-dir", str(own.path), "--dry-run")[0] == 0
    own.close()


def test_services_name_no_program(tmp_path: Path, clean_board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo_mpi.ops.deployment import find_deployment

    own = describe(tmp_path / "run")
    variables = {"ETCD_ENDPOINTS": clean_board.url, "PATH": "/theirs", "LD_PRELOAD": "x", "DYN_MPI_X": "x"}
    serve(own.path, environment=variables)
    environ = find_deployment(own.path, {"PATH": "/ours"}).environ
    assert environ == {"PATH": "/ours", "ETCD_ENDPOINTS": clean_board.url}
    own.close()


# M7: files that ranks write where others may write


class Warnings:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, text: str) -> None:
        self.said.append(text)


def write_ready_file(path: Path) -> list[str]:
    log = Warnings()
    context: Any = SimpleNamespace(
        phases=SimpleNamespace(durations={}, age=1.0), world=SimpleNamespace(size=1), log=log
    )
    settings: Any = SimpleNamespace(ready_file=path, served_model_name="m", endpoint="e")
    ReadyFile(context, settings, 1.0, None).on_ready()
    return log.said


@needs_root
@pytest.mark.parametrize("name", ["x.json", "x.json.partial", ".x.json.partial"])
@pytest.mark.parametrize("is_fifo", [False, True])
def test_a_ready_file_overwrites_nothing_else(shared: Path, tmp_path: Path, name: str, is_fifo: bool) -> None:
    own = tmp_path / "own"
    own.write_text("ours")
    as_neighbour(lambda: os.mkfifo(shared / name) if is_fifo else os.symlink(own, shared / name))
    with within(5):
        said = write_ready_file(shared / "x.json")
    assert own.read_text() == "ours"
    if os.path.lexists(shared / "x.json") and not said:
        content = json.loads((shared / "x.json").read_text())
        assert abs(content["started"] - time.time()) < 60
        assert content["process_start"] == process_start(os.getpid())
    assert sorted(os.listdir(shared)) == sorted({"x.json", name})


@needs_root
@pytest.mark.parametrize("name", ["x.prom", ".x.prom.partial"])
@pytest.mark.parametrize("is_fifo", [False, True])
def test_a_metrics_file_overwrites_nothing_else(shared: Path, tmp_path: Path, name: str, is_fifo: bool) -> None:
    own = tmp_path / "own"
    own.write_text("ours")
    as_neighbour(lambda: os.mkfifo(shared / name) if is_fifo else os.symlink(own, shared / name))
    said: list[str] = []
    with within(5):
        metrics = MetricsFile(shared / "x.prom", lambda: "a 1\n", said.append)
        metrics.on_exit(0)
    metrics.on_phase("exit")  # its thread ends
    assert (own.read_text(), said) == ("ours", [])
    assert (shared / "x.prom").read_text() == "a 1\n"
    assert (shared / "x.prom").stat().st_mode & 0o777 == 0o644


def plant_file(path: Path) -> None:
    path.write_text("")
    path.chmod(0o666)


@needs_root
@pytest.mark.parametrize("plant", [os.mkfifo, plant_file, lambda path: os.symlink("/dev/null", path)])
def test_a_log_goes_into_no_file_of_others(shared: Path, plant: Callable[[Path], None]) -> None:
    """As root here: the kernel would keep other users from some of these."""
    as_neighbour(lambda: plant(shared / "rank-0.log"))
    log = LogFile(str(shared / "rank-0.log"))
    with within(5), pytest.raises(OSError, match=r"belongs to user|is no regular file|is a link"):
        log.write(b"secret\n")
    with within(5), pytest.raises(OSError, match=r"belongs to user|is no regular file|is a link"):
        LoggedProcess("x", ["true"], environment={}, log=shared / "rank-0.log")


@needs_root
def test_failure_files_elsewhere_are_not_removed(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "w-rank-0.json").write_text("{}")
    as_neighbour(lambda: os.symlink(tmp_path, shared / "failures"))
    remove_stale_failure_files(shared / "failures", "w")
    assert (tmp_path / "w-rank-0.json").exists()
    remove_stale_failure_files(tmp_path, "w")
    assert not (tmp_path / "w-rank-0.json").exists()


# L1: what is printed, or pasted


@pytest.mark.parametrize("model", ["it's; touch x", "$(touch x)", "a\n'b", HOSTILE])
def test_the_curl_line_is_one_command(model: str) -> None:
    line = curl_line("http://h:1", model)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line.replace("curl", "printf '%s\\0'", 1)], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert (words[1], json.loads(words[-1])["model"]) == ("http://h:1/v1/chat/completions", model)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / f"m{HOSTILE}\nforged"
    folder.mkdir()
    config = {**ZOO["Llama-3.1-8B"], "architectures": [f"Llama{HOSTILE}\nforged"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("words", [("check", "--tensor-parallel-size", "8"), ("plan", "--gpus", "8")])
@pytest.mark.parametrize("output", ["text", "json"])
def test_names_of_a_model_move_no_cursor(model: Path, run: Run, words: tuple[str, ...], output: str) -> None:
    _, out, err = run(*words, "--model", str(model), "--output", output)
    assert out, err
    text = out + err
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    assert not [line for line in out.splitlines() if line.startswith("forged")]
    if output == "json":
        json.loads(out)
        return
    (start,) = [line for line in out.splitlines() if line.startswith("  srun ")] or [""]
    if words[0] == "plan":
        done = subprocess.run(["bash", "-c", f"printf '%s\\0' {start}"], capture_output=True, check=True)
        assert str(model).encode() in done.stdout.split(b"\0")


def test_an_error_moves_no_cursor(run: Run) -> None:
    _, _, err = run("check", "--model", f"/nope{HOSTILE}")
    assert "\\u001b" in err
    assert [character for character in err if not character.isprintable() and character != "\n"] == []


def test_models_of_a_frontend_and_urls_are_sanitized(run: Run, tmp_path: Path, clean_board: Board) -> None:
    own = describe(tmp_path / "run")
    serve(
        own.path, url=f"http://h:1/{HOSTILE}", environment={"ETCD_ENDPOINTS": clean_board.url, "NATS_SERVER": HOSTILE}
    )
    _, out, err = run("status", "--run-dir", str(own.path))
    assert "frontend DOWN" in out
    assert [character for character in out + err if not character.isprintable() and character != "\n"] == []
    own.close()


# L2: rank 0 from the ready file


RANK = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def rank() -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", RANK, "dynamo_mpi.worker"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


@pytest.fixture
def mpirun(tmp_path: Path) -> Iterator[Step]:
    command = Command("decode-0", "decode-0", (("sleep", "600"),))
    child = LoggedProcess("decode-0", command.words, environment=dict(os.environ), log=tmp_path / "log")
    yield Step(command, child, tmp_path / "decode-0.json")
    child.kill()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": -1},
        {"pid": 0},
        {"pid": 1},
        {"pid": True},
        {"pid": os.getpid()},
        {"started": time.time() - 3600},
        {"process_start": "another boot:7"},
        {"process_start": 7},
        {"started": None},
        {"started": float("nan")},
        {"host": "elsewhere"},
    ],
)
def test_a_ready_file_that_names_another_process(
    rank: subprocess.Popen[str], mpirun: Step, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid) if pid != mpirun.child.pid else None)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda descriptor, number: signalled.append(descriptor))
    content = {"pid": rank.pid, "host": os.uname().nodename, "started": time.time(), **changes}
    assert mpirun.ready_file is not None
    mpirun.ready_file.write_text(json.dumps(content))
    MpirunStepController().signal([mpirun])
    assert signalled == []


@pytest.mark.parametrize("is_older", [False, True])
def test_rank_0_of_the_ready_file_is_signalled(rank: subprocess.Popen[str], mpirun: Step, is_older: bool) -> None:
    """Whatever was done to the clock meanwhile; an older worker writes the time alone."""
    assert mpirun.ready_file is not None
    exact = {"started": time.time() - 7200, "process_start": process_start(rank.pid)}
    start = {"started": time.time()} if is_older else exact
    mpirun.ready_file.write_text(json.dumps({"pid": rank.pid, "host": os.uname().nodename, **start}))
    MpirunStepController().signal([mpirun])
    assert rank.wait(10) == -signal.SIGTERM
    assert mpirun.child.exit_code() is None
