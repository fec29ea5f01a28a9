# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi down` of workers without a launch of ours: those that are meant, each by the right way, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.worker_process import process_start
from dynamo_mpi.ops import stop
from tests.dynamo.running import eventually
from tests.unit.board import Board
from tests.unit.neighbour import NOBODY, needs_root
from tests.unit.slurm_commands import SlurmCommands
from tests.unit.test_status_command import describe, serve

HERE = os.uname().nodename.partition(".")[0]
# drains for a moment, and prints it
RANK = "import signal, sys; print('up', flush=True); signal.sigwait([signal.SIGTERM]); print('drained', flush=True)"
BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); " + RANK
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def board(clean_board: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.02)
    return clean_board


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def begin(*words: str) -> tuple[int, str, str]:
        code = main(["down", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return begin


class Rank:
    """A process that looks like a worker's rank 0.

    Args:
        name: what its command line has in it.
        user: whose it is; None: ours.
    """

    def __init__(self, name: str = "dynamo_mpi.worker", user: int | None = None) -> None:
        # another user may not be able to start our Python
        words = [sys.executable, "-c", BLOCKED, name] if user is None else ["/bin/sh", "-c", "echo up; read line", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, user=user)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def fields(self, **changes: Any) -> dict[str, Any]:
        """Return what a record says of it."""
        return {"host": HERE, "pid": self.process.pid, "started": time.time(), "job": None, "step": None, **changes}

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def start() -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def begin(*words: Any, **more: Any) -> Rank:
        ranks.append(Rank(*words, **more))
        return ranks[-1]

    yield begin
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()


def remove_after(board: Board, process: subprocess.Popen[str], key: str) -> None:
    """Take the record away as soon as its process has ended, as it would itself."""

    def follow() -> None:
        process.wait()
        board.remove(key)

    threading.Thread(target=follow, daemon=True).start()


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--job", "12"), ("--timeout", "1")])
def test_without_a_clear_target_nothing_is_done(
    board: Board, run: Run, slurm: SlurmCommands, words: tuple[str, ...]
) -> None:
    board.worker("agg")
    code, _, err = run(*words)
    assert (code, slurm.asked) == (ExitCode.USAGE, [])
    assert "--namespace NAME" in err


def test_a_rank_here_is_signalled_and_no_other(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    ours, theirs = start(), start()
    key = board.worker("agg", **ours.fields())
    board.worker("agg", "b", model="N", **theirs.fields())
    remove_after(board, ours.process, key)
    code, out, _ = run("--model", "M", "--dry-run")
    assert (code, out) == (0, f"M agg on agg1,agg2: kill -TERM {ours.process.pid}\n")
    assert ours.runs
    code, _, err = run("--model", "M")
    assert code == 0, err
    assert ours.process.wait(10) == 0, "in order"
    assert theirs.runs


def test_a_python_for_older_kernels_signals_too(
    board: Board, run: Run, start: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    rank = start()
    remove_after(board, rank.process, board.worker("agg", **rank.fields()))
    assert run("--model", "M", "--timeout", "10")[0] == 0
    assert rank.process.wait(10) == 0, "in order"


def test_prefill_goes_before_decode(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    ranks = {role: start() for role in ("decode", "prefill")}
    for role, rank in ranks.items():
        remove_after(board, rank.process, board.worker(role, **rank.fields()))
    code, _, err = run("--namespace", "dynamo")
    assert code == 0
    assert [line.split()[4] for line in err.splitlines() if ": ending " in line] == ["prefill", "decode"]


def test_a_step_of_slurms_is_signalled_by_its_id(board: Board, run: Run, slurm: SlurmCommands) -> None:
    slurm.lists("7.3|dynmpi-x-agg-0", "7.4|dynmpi-x-agg-1")
    key = board.worker("agg", job="7", step="3", host="n1", launch="dynmpi-x-agg-0")
    board.worker("agg", "b", job="8", step="3", host="n1")
    board.worker("agg", "c", job="7", step="4", host="n1", launch="dynmpi-x-agg-1")
    assert run("--namespace", "dynamo", "--job", "7", "--dry-run")[1].count("scancel --signal=TERM 7.") == 2
    code, err = ended_with(board, run, slurm, key, "--job", "7.3")
    assert (code, slurm.asked) == (0, ["--signal=TERM 7.3"]), err


def ended_with(board: Board, run: Run, slurm: SlurmCommands, key: str, *words: str) -> tuple[int, str]:
    """Run the verb, and remove the record as soon as Slurm is asked to signal."""

    def follow() -> None:
        eventually(lambda: slurm.asked, "scancel is asked", 10)
        board.remove(key)

    thread = threading.Thread(target=follow)
    thread.start()
    code, _, err = run("--namespace", "dynamo", *words)
    thread.join()
    return code, err


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        ("python", None),
        ("train", "train"),
        ("python", "dynmpi-x-agg-0"),
        ("dynmpi-x-agg-1", "dynmpi-x-agg-0"),
        (None, "dynmpi-x-agg-0"),
    ],
)
def test_a_step_with_another_name_gets_no_signal(
    board: Board, run: Run, slurm: SlurmCommands, name: str | None, launch: str | None
) -> None:
    slurm.lists(*([] if name is None else [f"7.3|{name}"]), "7.4|dynmpi-x-agg-0")
    key = board.worker("agg", job="7", step="3", host="n1", launch=launch)
    for words in ((), ("--job", "7")):
        code, _, err = run("--namespace", "dynamo", "--timeout", "1", *words)
        assert (code, slurm.asked) == (ExitCode.USAGE, []), err
    assert (f"has the name '{name}'" if name else "Slurm doesn't list it") in err
    # the user names it
    code, err = ended_with(board, run, slurm, key, "--job", "7.3")
    assert (code, slurm.asked) == (0, ["--signal=TERM 7.3"]), err


def test_without_slurms_answer_no_step_is_signalled(board: Board, run: Run, slurm: SlurmCommands) -> None:
    slurm.fails("Unable to contact slurm controller")
    board.worker("agg", job="7", step="3", host="n1", launch="dynmpi-x-agg-0")
    code, _, err = run("--namespace", "dynamo", "--timeout", "1")
    assert (code, slurm.asked, "Slurm doesn't answer" in err) == (ExitCode.USAGE, [], True)


@pytest.mark.parametrize(
    ("job", "step"), [("7", None), ("7 8", "0"), ("--all", "0"), ("7", "batch"), ("-7", "1"), ("7", "1\n")]
)
def test_what_is_no_step_never_reaches_scancel(
    board: Board, run: Run, slurm: SlurmCommands, job: str, step: str | None
) -> None:
    board.worker("agg", job=job, step=step, host="n1")
    code, _, err = run("--namespace", "dynamo", "--timeout", "1")
    assert (code, slurm.asked) == (ExitCode.USAGE, [])
    assert "its rank 0 is process 4711 on n1" in err


def test_who_can_not_be_reached_does_not_keep_the_others(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    rank = start()
    remove_after(board, rank.process, board.worker("agg", **rank.fields()))
    board.worker("agg", "b", host="elsewhere", job=None)
    code, _, err = run("--namespace", "dynamo")
    assert (code, rank.process.wait(10)) == (ExitCode.USAGE, 0)
    assert "process 4711 on elsewhere" in err


def test_a_clock_set_since_the_start_hides_no_worker(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    rank = start()
    fields = rank.fields(started=time.time() - 7200, process_start=process_start(rank.process.pid))
    remove_after(board, rank.process, board.worker("agg", **fields))
    assert run("--namespace", "dynamo")[0] == 0
    assert rank.process.wait(10) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"started": time.time() - 3600},
        {"process_start": "another boot:7"},
        {"started": time.time() + 3600},
        {"started": None},
        {"host": "elsewhere"},
        {"pid": 1},
        {"pid": 2**22 + 1},
        {"pid": os.getpid()},
    ],
)
def test_a_process_that_is_another_is_left_alone(
    board: Board, run: Run, start: Callable[..., Rank], changes: dict[str, Any]
) -> None:
    rank = start()
    board.worker("agg", **rank.fields(**changes))
    assert run("--namespace", "dynamo", "--timeout", "1")[0] == ExitCode.USAGE
    assert rank.runs


def test_a_program_that_is_no_worker_is_left_alone(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    rank = start("my_dynamo_mpi.worker.py")
    board.worker("agg", **rank.fields())
    assert run("--namespace", "dynamo")[0] == ExitCode.USAGE
    assert rank.runs


@needs_root
def test_another_users_process_is_left_alone(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    rank = start(user=NOBODY)
    board.worker("agg", **rank.fields())
    assert run("--namespace", "dynamo")[0] == ExitCode.USAGE
    assert rank.runs


def test_what_is_left_when_the_time_is_up(board: Board, run: Run, start: Callable[..., Rank]) -> None:
    rank = start()
    board.worker("agg", phase="drain", phase_since=time.time() - 7, **rank.fields())
    code, _, err = run("--namespace", "dynamo", "--timeout", "0.3")
    assert code == ExitCode.DEADLINE
    assert "not ended in time: agg on agg1,agg2: drain, 7 s" in err


def test_no_listener(board: Board, run: Run) -> None:
    board.worker("agg", namespace="other")
    code, _, err = run("--namespace", "dynamo")
    assert (code, "no such worker is there" in err) == (0, True)


def test_all_workers_of_a_run_folder_with_services_of_its_own(
    board: Board, run: Run, tmp_path: Path, start: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dynamo_mpi-1"
    folder.mkdir()
    serve(folder, environment={"ETCD_ENDPOINTS": board.url})
    monkeypatch.delenv("ETCD_ENDPOINTS")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    rank = start()
    remove_after(board, rank.process, board.worker("agg", **rank.fields()))
    code, _, err = run()
    assert (code, "nothing runs in" in err) == (0, True), "not by accident"
    assert rank.runs
    assert run("--run-dir", str(folder))[0] == 0
    assert rank.process.wait(10) == 0


def test_a_dry_run_of_a_deployment_leaves_it_alone(board: Board, run: Run, tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run")
    code, out, _ = run(str(run_dir.path), "--dry-run")
    assert (code, out) == (0, f"the deployment in {run_dir.path}: prefill-0, decode-0, and its services\n")
    assert not run_dir.stop_requested()
    run_dir.close()


def test_where_etcd_does_not_answer(board: Board, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
    assert run("--namespace", "dynamo")[0] == ExitCode.UNAVAILABLE


def test_two_folders_are_one_too_many(run: Run, tmp_path: Path) -> None:
    first, second = describe(tmp_path / "a"), describe(tmp_path / "b")
    code, _, err = run(str(first.path), "--run-dir", str(second.path))
    assert (code, "two folders are named" in err) == (ExitCode.USAGE, True)
    assert not first.stop_requested()
    assert not second.stop_requested()
    assert run(str(first.path), "--run-dir", str(first.path), "--dry-run")[0] == 0
    first.close()
    second.close()


def test_a_job_that_is_none(board: Board, run: Run) -> None:
    for job in ("x", "7.", "7.batch", "-1", "7;8"):
        code, _, err = run("--namespace", "dynamo", f"--job={job}")
        assert (code, "JOB.STEP" in err) == (ExitCode.USAGE, True), json.dumps(job)


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_another_users_folder_is_77(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    describe(folder).close()
    run(str(folder))  # nothing is imported any more
    owner, folder_mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    if owner == 0:
        os.seteuid(NOBODY)  # root may read everything
    try:
        code, _, err = run(str(folder), *words)
    finally:
        os.seteuid(owner)
        folder.chmod(folder_mode)
    assert code == ExitCode.NOT_AUTHORISED
    assert "ask the user who launched it" in err


def test_the_folder_of_a_killed_local_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all that is in it, as the next `local` would; that of one that runs stays."""
    dead, alive = tmp_path / "dynamo-mpi-local-dead", tmp_path / "dynamo-mpi-local-alive"
    describe(dead, pid=2**22 + 1).close()
    (dead / "deployment.json").write_text(json.dumps({"schema": 1, "pid": 2**22 + 1, "host": HERE, "workers": []}))
    (dead / "etcd").mkdir()
    run_dir = describe(alive)
    assert main(["down", str(dead)]) == 0, capsys.readouterr().err
    assert (dead.exists(), alive.exists()) == (False, True)
    run_dir.close()


@pytest.mark.parametrize("words", [("--run-dir", ""), ("",)])
def test_an_empty_folder_name_is_no_folder_at_all(run: Run, words: tuple[str, ...]) -> None:
    code, _, said = run(*words)
    assert (code, "--run-dir is ''" in said) == (64, True), said
