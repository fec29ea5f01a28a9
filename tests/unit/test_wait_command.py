# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi wait` for what is written into a real etcd; the frontend of `tests/dynamo` is real, the one here only says what is wanted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.ops import wait as waiting
from tests.servers import closed_port, drip, listening, reply
from tests.unit.board import Board
from tests.unit.test_status_command import describe, serve

Capture = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]
EVENTS = b'data: {"choices": [{"delta": {"content": "Hello"}}], "usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + EVENTS
NOT_YET = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def board(clean_board: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    """An etcd with nothing in it; waits look often."""
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "REMINDER_SECONDS", (0.05, 10.0))
    return clean_board


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Wait; ``then`` is done once it has looked, and said that it waits."""

    def begin(*words: str, then: Callable[[], object] | None = None) -> tuple[int, str, str]:
        steps = [] if then is None else [then]

        def log_once(self: waiting.ReadinessWaiter) -> None:
            log_missing(self)
            while steps:
                steps.pop()()

        log_missing = waiting.ReadinessWaiter._log_missing
        with monkeypatch.context() as patched:
            patched.setattr(waiting.ReadinessWaiter, "_log_missing", log_once)
            code = main(["wait", *words])
        assert not steps, "it has not waited"
        said = capsys.readouterr()
        return code, said.out, said.err

    return begin


def test_ready_from_before_the_start(board: Board, run: Run) -> None:
    def come() -> None:
        board.worker("prefill", phase="serve")
        board.worker("decode", phase="serve")

    code, out, err = run(then=come)
    assert code == 0
    assert "waiting for workers: none is there; 0 s so far" in err
    assert "no frontend is known" in err
    assert "ready after 0." in out
    assert "M: prefill, decode" in out


@pytest.mark.parametrize(
    ("there", "roles", "missing"),
    [
        ({"agg": "serve"}, "", []),
        ({"agg": "serve", "encode": "load"}, "", []),
        ({"prefill": "serve"}, "", ["decode: not there"]),
        ({"decode": "serve"}, "", ["prefill: not there"]),
        ({"prefill": "serve", "decode": "drain"}, "", ["decode: drain, 2 min"]),
        ({"prefill": "serve", "decode": "load"}, "prefill", []),
        ({"agg": "serve"}, "decode,prefill", ["decode: not there", "prefill: not there"]),
        ({}, "decode", ["decode: not there"]),
    ],
)
def test_the_roles_that_are_needed(
    board: Board, run: Run, there: dict[str, str], roles: str, missing: list[str]
) -> None:
    for role, phase in there.items():
        board.worker(role, role, phase=phase)
    words = [word for role in roles.split(",") if role for word in ("--role", role)]
    code, out, _ = run(*words, "--timeout", "0.1", "--output", "json")
    content = json.loads(out)
    assert [f"{lack['name']}: {lack['position']}" for lack in content["missing"]] == missing
    assert (code, content["ok"], content["exit_code"]) == ((124, False, 124) if missing else (0, True, 0))


def test_the_timeout_says_where_it_stands(board: Board, run: Run) -> None:
    board.worker("prefill", phase="serve")
    progress = {"done": 3, "ranks": 6, "slowest_rank": 5, "slowest_host": "n3", "seconds": 40.0}
    board.worker("decode", "a", phase="preflight")
    board.worker("decode", "b", phase="load", phase_since=time.time() - 40, progress=progress)
    code, out, err = run("--timeout", "0.2")
    assert (code, out) == (124, "")
    assert "waiting for decode: load 3/6, slowest n3, 40 s; 0 s so far" in err
    assert "not ready after 0.2 s: decode: load 3/6, slowest n3, 40 s\n" in err


def test_several_models_and_one(board: Board, run: Run) -> None:
    board.worker("agg", "a", phase="serve")
    board.worker("agg", "b", model="N", phase="load")
    code, _, err = run("--timeout", "0.1")
    assert (code, "not ready after 0.1 s: N agg: load" in err) == (124, True)
    assert run("--model", "M")[0] == 0


def test_workers_whose_model_cards_differ_are_not_ready(board: Board, run: Run) -> None:
    board.worker("agg", "a", phase="serve")
    board.worker("agg", "b", phase="serve")
    board.worker("agg", "c", model="N", phase="serve")
    former = board.card("a1", display_name="M", context_length=256)
    board.card("a2", display_name="M", context_length=128)
    # of workers that this wait isn't for
    board.card("a3", "other", display_name="M", context_length=1)
    code, out, err = run("--timeout", "0.2")
    assert (code, out) == (78, "")
    assert "not ready after 0.2 s: M: the cards of M in dynamo differ, and frontends take one for all: context" in err
    assert "  expected: workers of one model with one card" in err
    code, out, _ = run("--timeout", "0.1", "--output", "json")
    content = json.loads(out)
    assert (code, content["exit_code"], [lack["name"] for lack in content["missing"]]) == (78, 78, ["M"])
    assert run("--model", "N")[0] == 0
    board.worker("agg", "d", phase="load")
    # the former worker of a rolling change ends
    assert run(then=lambda: board.remove(former))[0] == 0


@pytest.mark.parametrize(
    ("kind", "roles", "code"),
    [
        ("prefill", "", 78),
        ("prefill", "prefill", 78),
        ("prefill", "decode", 0),
        ("decode", "prefill", 0),
        ("decode", "decode", 78),
        ("aggregated", "decode", 78),
    ],
)
def test_unlike_cards_of_another_role_are_no_reason(board: Board, run: Run, kind: str, roles: str, code: int) -> None:
    for role in ("prefill", "decode"):
        board.worker(role, role, phase="serve")
    for instance, length in (("a1", 256), ("a2", 128)):
        board.card(instance, display_name="M", context_length=length, worker_type=kind)
    words = ("--role", roles) if roles else ()
    assert run(*words, "--timeout", "0.2")[0] == code


def test_unlike_cards_are_no_reason_where_a_worker_still_loads(board: Board, run: Run) -> None:
    board.worker("prefill", "a", phase="load")
    board.card("a1", display_name="M", context_length=256)
    board.card("a2", display_name="M", context_length=128)
    assert run("--timeout", "0.1")[0] == 124


def test_a_completion_must_come_back(board: Board, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    board.worker("agg", phase="serve")
    asked: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        asked.append(b"")
        while b'"stream"' not in asked[-1]:
            asked[-1] += connection.recv(65536)
        connection.sendall(NOT_YET if len(asked) == 1 else ANSWER)
        connection.shutdown(socket.SHUT_RDWR)

    with listening(behave) as port:
        monkeypatch.setenv("DYN_MPI_FRONTEND", f"http://127.0.0.1:{port}")
        code, out, err = run("--output", "json")
    assert code == 0, err
    assert json.loads(out)["completions"]["M"]["tokens"] == 1
    assert len(asked) == 2
    assert all(b"POST /v1/chat/completions" in text and b'"model": "M"' in text for text in asked)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (NOT_YET, "it serves no completion yet"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 10\r\n\r\n\x1b[2J broke", "the frontend answered 500: \\x1b[2J broke"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: [1]\n\n", "something else than a frontend answers there"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "the answer broke off"),
        (b"", "the frontend broke off"),
    ],
)
def test_a_frontend_that_does_not_answer(board: Board, run: Run, answer: bytes, why: str) -> None:
    board.worker("agg", phase="serve")
    with listening(reply(answer)) as port:
        code, _, err = run("--frontend", f"http://127.0.0.1:{port}", "--timeout", "0.3")
    assert code == 124
    assert f"a completion of M by http://127.0.0.1:{port}: " in err
    assert why in err


def test_a_password_in_the_frontends_url_is_never_said(board: Board, run: Run) -> None:
    board.worker("agg", phase="serve")
    with closed_port() as port:
        code, out, err = run(
            "--frontend", f"http://u:hunter22@127.0.0.1:{port}", "--timeout", "0.3", "--output", "json"
        )
    assert code == 124
    assert f"by http://127.0.0.1:{port}: the frontend does not answer: Connection refused" in err
    assert "hunter22" not in out + err
    code, out, err = run("--frontend", "ftp://u:hunter22@h", "--output", "json")
    assert (code, "hunter22" in out + err) == (ExitCode.USAGE, False)


def test_an_unhandled_failure_ends_it(board: Board, run: Run) -> None:
    board.failure("decode", "old", time=time.time() - 600, exit_code=70)
    board.worker("prefill", phase="serve")
    dying = board.worker("decode", "f", phase="load")

    def fail() -> None:
        board.failure("decode", "f", exit_code=78, error="error I1: KV types differ")
        board.remove(dying)

    code, out, err = run("--output", "json", then=fail)
    assert code == 78, err
    assert json.loads(out)["error"]["exit_code"] == 78
    assert (
        "it can't become ready: decode: exit code 78 in load, rank 3 on n4, 0 s ago: error I1: KV types differ" in err
    )
    assert "rank 3 on n4: killed by SIGKILL\nmore" in err, "the report is shown"


def test_a_failure_that_another_worker_makes_good(board: Board, run: Run) -> None:
    board.worker("decode", "b", phase="load")
    board.worker("prefill", phase="serve")
    code, _, err = run(
        "--timeout", "0.4", then=lambda: (board.failure("decode"), board.failure("agg", "x", model="N", namespace="o"))
    )
    assert code == 137, "no worker is left for the other namespace's"
    assert "agg: exit code 137" in err
    code, _, err = run("--namespace", "dynamo", "--timeout", "0.4", then=lambda: board.failure("decode", "g"))
    assert code == 124
    board.failure("agg", "h")
    assert run("--role", "prefill")[0] == 0


def test_an_etcd_that_is_not_there_yet(board: Board, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{port}")
        code, out, err = run("--timeout", "0.3", "--output", "json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (ExitCode.UNAVAILABLE, 69)
    assert "waiting for etcd: etcd does not answer" in err


@pytest.mark.usefixtures("board", "secured_etcd")
def test_an_etcd_that_refuses_is_77(run: Run) -> None:
    assert run()[0] == ExitCode.NOT_AUTHORISED


def test_a_deployment_from_before_its_folder_is_there(board: Board, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made: list[RunDir] = []

    def launch() -> None:
        made.append(describe(folder))
        serve(folder, environment={"ETCD_ENDPOINTS": board.url})
        board.worker("prefill", phase="serve", launch="d-prefill-0")
        board.worker("decode", "x", phase="serve", launch="somebody's")
        board.worker("decode", phase="serve", launch="d-decode-0")

    code, _, err = run("--run-dir", str(folder), then=launch)
    assert code == 0, err
    assert f"waiting for deployment: none runs in {folder}" in err
    made[0].close()


def test_all_workers_of_a_deployment_must_serve(board: Board, run: Run, tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run")
    words = ("--run-dir", str(run_dir.path))
    code, _, err = run(*words, "--timeout", "0.2")
    assert (code, "services: not up yet" in err) == (124, True)
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    board.worker("prefill", phase="serve", launch="d-prefill-0")
    board.worker("decode", phase="serve", launch="somebody's")
    code, _, err = run(*words, "--timeout", "0.2")
    assert (code, "decode-0: not there" in err) == (124, True)
    assert run(*words, "--role", "prefill")[0] == 0
    run_dir.close()


def test_a_deployment_that_does_not_say_who_should_be_there_is_not_ready_for_that(
    board: Board, run: Run, tmp_path: Path
) -> None:
    run_dir = describe(tmp_path / "run", workers=None)
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    assert run("--run-dir", str(run_dir.path), "--timeout", "0.1")[0] == 124
    run_dir.close()


@pytest.mark.parametrize(("code", "expected"), [(78, 78), (137, 137), (0, ExitCode.TEMPORARY)])
def test_an_end_of_the_deployment_is_the_end_of_the_wait(
    board: Board, run: Run, tmp_path: Path, code: int, expected: int
) -> None:
    run_dir = describe(tmp_path / "run")

    def end() -> None:
        run_dir.write_end(code, "decode-0 ended")
        run_dir.close()

    got, out, err = run("--run-dir", str(run_dir.path), "--output", "json", then=end)
    assert (got, json.loads(out)["exit_code"]) == (expected, expected)
    assert f"the deployment in {run_dir.path} has ended, 0 s ago: decode-0 ended" in err


def test_a_deployment_that_ended_before_is_the_end_of_a_wait_without_a_new_launch(
    board: Board, run: Run, tmp_path: Path
) -> None:
    run_dir = describe(tmp_path / "run")
    run_dir.write_end(78, "decode-0 ended")
    run_dir.close()
    code, _, err = run("--run-dir", str(run_dir.path), "--timeout", "0.1")
    assert (code, "has ended, " in err, "decode-0 ended" in err) == (78, True, True), err


def test_a_launch_that_is_refused_is_the_end_of_the_wait(
    board: Board, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "hosts").write_text("localhost\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--model", "m", "--prefill-engine-config", "p"]

    def launch(*more: str) -> int:
        return main(["launch", *words, "--run-dir", str(folder), *more])

    assert launch("--decode-engine-config", "d", "--dry-run") == 64
    assert not folder.exists()
    code, _, err = run("--run-dir", str(folder), then=lambda: launch("--decode-engine-config", "d"))
    assert (code, "the launch was refused: " in err, "that takes 2 nodes" in err) == (64, True, True)
    assert sorted(path.name for path in folder.iterdir()) == ["ended.json", "lock"]
    # what isn't said at all, and a folder that is named by a variable
    monkeypatch.setenv("DYN_MPI_RUN_DIR", str(tmp_path / "other"))
    assert main(["launch", *words]) == 64
    monkeypatch.setattr(waiting, "STALE_SECONDS", 0.1)
    code, _, err = run("--run-dir", str(tmp_path / "other"))
    assert (code, "no engine config for the decode worker" in err) == (64, True)


def test_a_refused_launch_without_a_named_folder_names_the_existing_one(
    board: Board, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    Path("hosts").write_text("localhost\n")
    words = ["launch", "--hostfile", "hosts", "--model", "m", "--prefill-engine-config", "p"]
    assert main(words) == 64
    assert not Path("dynamo_mpi-run").exists(), "a wrong command line makes no folder"
    Path("dynamo_mpi-run").mkdir(mode=0o700)
    code, _, err = run("--run-dir", "dynamo_mpi-run", then=lambda: main(words))
    assert (code, "the launch was refused: " in err) == (64, True), err


def test_a_folder_that_goes_ends_the_wait(board: Board, run: Run, tmp_path: Path) -> None:
    """That of `local` goes with it."""
    run_dir = describe(tmp_path / "run")

    def end() -> None:
        run_dir.close()
        shutil.rmtree(tmp_path / "run")

    code, _, err = run("--run-dir", str(tmp_path / "run"), "--timeout", "30", then=end)
    assert (code, f"the deployment in {tmp_path / 'run'} has ended" in err) == (75, True), err


def test_what_can_never_be_a_run_folder_is_refused_at_once(board: Board, run: Run, tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    other.mkdir(mode=0o700)
    (other / "stop").write_text("of another program")
    for path in (file, file / "below", other):
        code, out, err = run("--run-dir", str(path), "--output", "json")
        content: dict[str, Any] = json.loads(out)
        assert (code, content["error"]["exit_code"]) == (ExitCode.USAGE, 64), err
        assert content["seconds"] < 30


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"environment": 1}'])
@pytest.mark.parametrize("is_launched", [True, False])
def test_services_that_make_no_sense_are_refused(
    board: Board, run: Run, content: str, is_launched: bool, tmp_path: Path
) -> None:
    run_dir = describe(tmp_path / "run")
    if not is_launched:
        run_dir.close()
    (tmp_path / "run" / "services.json").write_text(content)
    code, _, err = run("--run-dir", str(tmp_path / "run"))
    assert (code, f"{tmp_path}/run/services.json can't be used: " in err) == (ExitCode.DATA, True), err
    assert "expected: what the services write there" in err and "dynamo-mpi down" in err
    assert main(["status", "--run-dir", str(tmp_path / "run")]) == ExitCode.DATA


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_services_that_cannot_be_read_at_the_moment_are_not_up_yet(
    board: Board, run: Run, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(folder: OwnFolder, name: str) -> bytes:
        if name == "services.json":
            raise OSError(number, os.strerror(number))
        return read(folder, name)

    run_dir = describe(tmp_path / "run")
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    board.worker("prefill", phase="serve", launch="d-prefill-0")
    board.worker("decode", phase="serve", launch="d-decode-0")
    read = OwnFolder.read
    monkeypatch.setattr(OwnFolder, "read", fail)
    assert main(["status", "--run-dir", str(run_dir.path)]) == ExitCode.UNAVAILABLE
    assert "aren't up yet" in capsys.readouterr().err
    monkeypatch.setattr(waiting, "REFUSALS", 1)
    code, _, err = run("--run-dir", str(run_dir.path), then=lambda: monkeypatch.setattr(OwnFolder, "read", read))
    assert (code, "services: not up yet" in err) == (0, True), err
    run_dir.close()


def test_services_that_make_sense_later_are_no_reason(
    board: Board, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A launch in the folder of a damaged one removes the file."""
    monkeypatch.setattr(waiting, "REFUSALS", 1000)
    describe(tmp_path / "run").close()
    (tmp_path / "run" / "services.json").write_text("{")

    def launch() -> None:
        describe(tmp_path / "run")
        serve(tmp_path / "run", environment={"ETCD_ENDPOINTS": board.url})
        board.worker("prefill", phase="serve", launch="d-prefill-0")
        board.worker("decode", phase="serve", launch="d-decode-0")

    code, _, err = run("--run-dir", str(tmp_path / "run"), then=launch)
    assert (code, "waiting for services: " in err) == (0, True), err


def test_a_launch_that_is_refused_says_nothing_of_one_that_runs_there(board: Board, run: Run, tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run")
    (tmp_path / "hosts").write_text("localhost\n")
    words = ("--hostfile", str(tmp_path / "hosts"), "--model", "m", "--prefill-engine-config", "p")
    assert main(["launch", *words, "--decode-engine-config", "d", "--run-dir", str(run_dir.path)]) == 64
    assert not (run_dir.path / "ended.json").exists()
    run_dir.close()


def test_an_earlier_end_in_the_same_folder_counts_where_nothing_starts(
    board: Board, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "STALE_SECONDS", 0.3)
    folder = tmp_path / "run"
    earlier = describe(folder)
    earlier.write_end(70, "failed")
    earlier.close()
    made: list[RunDir] = []
    code, _, err = run("--run-dir", str(folder), "--timeout", "0.6", then=lambda: made.append(describe(folder)))
    assert (code, "services: not up yet" in err) == (124, True)
    made[0].write_end(75, "failed")
    made[0].close()
    began = time.monotonic()
    assert run("--run-dir", str(folder))[0] == 75
    assert time.monotonic() - began >= 0.3


def test_services_that_were_started_later_in_the_folder_of_a_deployment_that_ended(
    board: Board, run: Run, tmp_path: Path
) -> None:
    run_dir = describe(tmp_path / "run")
    run_dir.write_end(70, "failed")
    run_dir.close()
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    board.worker("agg", phase="serve")
    assert run("--run-dir", str(run_dir.path))[0] == 0


def test_while_launch_runs_a_failure_is_reported_and_waited_for(board: Board, run: Run, tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run")
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    board.worker("prefill", phase="serve", launch="d-prefill-0")
    words = ("--run-dir", str(run_dir.path), "--timeout", "0.4")
    code, _, err = run(*words, then=lambda: board.failure("decode", launch="d-decode-0"))
    assert code == 124, err
    assert "failed: decode-0: exit code 137 in load" in err
    run_dir.close()


def test_a_launcher_that_was_killed_is_75(board: Board, run: Run, tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "run", pid=2**22 + 1)
    code, _, err = run("--run-dir", str(run_dir.path), then=lambda: os.close(run_dir._lock))
    assert (code, "was killed" in err) == (ExitCode.TEMPORARY, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--role", "router"),
        ("--role", ","),
        ("--timeout", "soon"),
        ("--frontend", "https://h"),
        ("--frontend", "http://h:x"),
    ],
)
def test_what_is_no_setting(board: Board, run: Run, words: tuple[str, str]) -> None:
    code, out, err = run(*words, "--output", "json")
    content: dict[str, Any] = json.loads(out)
    assert (code, content["error"]["exit_code"]) == (ExitCode.USAGE, 64)
    assert words[0] in err


def test_an_answer_that_never_ends_does_not_outlast_the_timeout(board: Board, run: Run) -> None:
    board.worker("agg", phase="serve")
    began = time.monotonic()
    with listening(drip(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", 0.005)) as port:
        code, _, err = run("--frontend", f"http://127.0.0.1:{port}", "--timeout", "0.2")
    # it is asked for a second at least
    assert (code, time.monotonic() - began < 3) == (124, True), err
    assert "no answer in 1 s" in err
