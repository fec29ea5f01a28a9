# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi status` of what stands in a real etcd, of any origin."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.phases import FORMER_PHASES, PHASES
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.ops.deployment import find_deployment
from tests.conftest import ROOT
from tests.servers import closed_port, running_nats
from tests.unit.board import Board

PROGRESS = {"done": 3, "ranks": 6, "slowest_rank": 5, "slowest_host": "n3", "seconds": 40.0}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def board(clean_board: Board) -> Board:
    return clean_board


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def begin(*words: str) -> tuple[int, str, str]:
        code = main(["status", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return begin


def as_json(run: Run, *words: str) -> dict[str, Any]:
    code, out, err = run("--output", "json", *words)
    assert code == 0, err
    content: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return content


def test_a_row_for_each_worker(board: Board, run: Run) -> None:
    now = time.time()
    layout = {"tp_size": 8, "pp_size": 1, "cp_size": 1, "ep_size": 8, "attention_dp": True, "ranks": 8}
    board.worker("decode", phase="load", phase_since=now - 40, progress=PROGRESS, attempt=2, layout=layout)
    board.worker("prefill", phase="serve", phase_since=now - 7300, started=now - 7400, in_flight=3)
    code, out, err = run()
    assert (code, err) == (0, "")
    head, *rows = (line.split("  ") for line in out.splitlines())
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert [cell for cell in head if cell][:2] == ["model", "worker"]
    assert cells == [
        ["M", "prefill", "TP8", "prefill1,prefill2", "serve", "2.0 h", "2.1 h", "3", "1"],
        ["M", "decode", "TP8/EP8 ADP", "decode1,decode2", "load", "40 s", "2 min", "-", "2", "3/6, slowest n3"],
    ]
    found = as_json(run)
    assert (found["schema"], found["ok"], found["ready"], found["failures"], found["warnings"]) == (
        1,
        True,
        False,
        [],
        [],
    )
    decode = found["workers"][1]
    assert (decode["progress"], decode["layout"]["text"], decode["hosts"]) == (
        {**PROGRESS, "read": None},
        "TP8/EP8 ADP",
        ["decode1", "decode2"],
    )


def test_progress_of_ranks_that_report_none(board: Board, run: Run) -> None:
    board.worker("agg", phase="load", progress={**PROGRESS, "done": None, "read": 37_600_000_000})
    assert run()[1].splitlines()[1].endswith("37.6 GB read, slowest n3")


def test_a_record_of_an_older_version(board: Board, run: Run) -> None:
    board.worker("agg", phase="serve")
    assert run()[1].splitlines()[1].split() == ["M", "agg", "TP8", "agg1,agg2", "serve", "-", "2", "min", "-", "1"]
    (worker,) = as_json(run)["workers"]
    assert [worker[name] for name in ("phase_since", "in_flight", "progress", "system", "trace")] == [None] * 5
    assert as_json(run)["ready"] is True


def test_a_failure_without_a_new_start_is_not_well(board: Board, run: Run) -> None:
    board.failure("decode", time=time.time() - 30, attempt=2)
    _, out, _ = run()
    assert "no worker is there" in out
    assert "decode, start 2: exit code 137 in load, rank 3 on n4, 30 s ago: killed by SIGKILL" in out
    found = as_json(run)
    assert (found["ok"], found["failures"][0]["followed"], found["failures"][0]["report"]) == (
        False,
        False,
        "rank 3 on n4: killed by SIGKILL\nmore",
    )


def test_a_failure_of_an_unknown_rank(board: Board, run: Run) -> None:
    board.failure("agg", rank=-1, host="", phase="", error="")
    found = as_json(run)
    assert (found["failures"][0]["rank"], found["warnings"]) == (None, [])
    assert "  agg: exit code 137, 0 s ago: no error text" in run()[1]


@pytest.mark.parametrize(
    ("failed", "newer", "followed"),
    [
        ({}, {}, True),
        ({}, {"started": time.time() - 500}, False),
        ({"launch": "x"}, {}, False),
        ({"launch": "x"}, {"launch": "x", "started": time.time() - 500}, False),
        ({"launch": "x"}, {"launch": "x", "started": time.time() - 500, "attempt": 2}, True),
        ({}, {"role": "agg"}, False),
        ({"model": "another"}, {}, False),
    ],
)
def test_a_newer_start_follows_a_failure(
    board: Board, run: Run, failed: dict[str, Any], newer: dict[str, Any], followed: bool
) -> None:
    board.failure("decode", time=time.time() - 300, **failed)
    board.worker("decode", **{"phase": "load", **newer})
    found = as_json(run)
    assert (found["failures"][0]["followed"], found["ok"]) == (followed, followed)
    assert ("[started again]" in run()[1]) is followed


def test_narrowed_by_namespace_and_model(board: Board, run: Run) -> None:
    board.worker("agg", "a")
    board.worker("agg", "b", model="N")
    board.worker("agg", "c", namespace="other")
    board.worker("agg", "d", namespace="dynamo2")
    board.failure("agg", model="N")

    def keys(*words: str) -> list[str]:
        return sorted(worker["key"].rpartition("/")[2] for worker in as_json(run, *words)["workers"])

    assert keys() == ["a", "b", "c", "d"]
    assert keys("--namespace", "dynamo") == ["a", "b"]
    assert keys("--model", "N") == ["b"]
    assert keys("--namespace", "other", "--model", "N") == []
    assert as_json(run, "--model", "M")["failures"] == []


HOSTILE = "\x1b[2J\x1b]0;pwned\x07\r\nM\u202e\x9b1m\x00\ud800" + "A" * 5000


def test_a_hostile_record_breaks_neither_table_nor_terminal(board: Board, run: Run) -> None:
    board.worker("decode", phase="serve")
    board.worker("agg", "h", model=HOSTILE, phase=HOSTILE, hosts=[HOSTILE] * 50, launch=HOSTILE)
    board.failure("agg", error=HOSTILE, host=HOSTILE, phase=HOSTILE, report=HOSTILE * 3)
    board.put("worlds/dynamo/backend/\x1b[31m", b"{")
    _, out, _ = run()
    assert all(line.isprintable() and len(line) <= 240 for line in out.splitlines()), out
    assert any(line.startswith("M ") for line in out.splitlines()), "the other row is there, whole"
    assert "\\x1b[2J" in out
    assert all(character.isprintable() or character == "\n" for character in json.dumps(as_json(run)))


@pytest.mark.parametrize(
    "changes",
    [
        {"in_flight": "3"},
        {"in_flight": -1},
        {"progress": [1]},
        {"progress": {"done": None, "ranks": 1e308}},
        {"phase_since": float("inf")},
        {"started": 10**400},
        {"attempt": True},
        {"hosts": {"n": 1}},
        {"layout": 7},
        {"launch": ["x"]},
    ],
)
def test_an_odd_field_is_reported_and_the_rest_is_shown(board: Board, run: Run, changes: dict[str, Any]) -> None:
    key = board.worker("agg", phase="serve", **changes)
    found = as_json(run)
    assert [worker["phase"] for worker in found["workers"]] == ["serve"]
    warnings = [text for text in found["warnings"] if text.startswith(f"{key}: {next(iter(changes))} is not ")]
    # half of a progress is none
    assert warnings or "progress" in changes
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff{", "no JSON"),
        (b"", "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b"9" * 5000, "no JSON"),
        ([1], "no JSON object"),
        ({"schema": 99}, "of schema 99, not 1"),
        ({"schema": "\x1b[2J" * 99}, "of schema "),
        ({"schema": 1}, "role is missing"),
        (
            {
                "schema": 1,
                "pid": 7,
                "namespace": "other",
                **dict.fromkeys(("component", "model", "role", "phase", "host"), "x"),
            },
            "under the key of another worker",
        ),
    ],
)
def test_what_is_no_record_is_a_warning(board: Board, run: Run, content: Any, why: str) -> None:
    board.worker("agg", phase="serve")
    key = board.put("worlds/dynamo/backend/zz", content)
    found = as_json(run)
    assert len(found["workers"]) == 1
    (warning,) = found["warnings"]
    assert warning.startswith(f"{key} can't be read, and is ignored: ")
    assert why in warning
    assert warning.isprintable()


def test_a_phase_and_a_role_that_are_not_known(board: Board, run: Run) -> None:
    board.worker("agg", role="router", phase="dance")
    assert "its phase 'dance' and its role 'router' isn't known here" in as_json(run)["warnings"][0]


@pytest.mark.parametrize(("former", "phase"), FORMER_PHASES.items())
def test_an_older_workers_phase_is_known(board: Board, run: Run, former: str, phase: str) -> None:
    board.worker("agg", phase=former)
    assert phase in PHASES
    assert as_json(run)["warnings"] == []


def test_where_no_etcd_answers(board: Board, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://me:s3cret@127.0.0.1:{port}")
        code, out, err = run("--output", "json")
    assert code == ExitCode.UNAVAILABLE
    error = json.loads(out)["error"]
    assert (error["exit_code"], json.loads(out)["ok"]) == (69, False)
    assert "connection refused" in error["found"]
    assert "ETCD_ENDPOINTS" in error["fix"]
    assert "s3cret" not in out + err
    assert "Traceback" not in err


def test_a_refusal_is_77(board: Board, secured_etcd: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run()[0] == ExitCode.NOT_AUTHORISED
    for name, value in secured_etcd.items():
        monkeypatch.setenv(name, value)
    assert run()[:2] == (0, "no worker is there\n")


def describe(folder: Path, **changes: Any) -> RunDir:
    """Make a run folder as `launch` does."""
    run_dir = RunDir(folder)
    workers = [
        {"name": f"{role}-0", "role": role, "nodes": ["n1"], "ranks": 2, "step": f"{role}-0", "launch": f"d-{role}-0"}
        for role in ("prefill", "decode")
    ]
    content = {"schema": 1, "pid": os.getpid(), "host": os.uname().nodename, "job_id": ""}
    run_dir.describe({**content, "workers": workers, **changes})
    return run_dir


def serve(folder: Path, **content: Any) -> None:
    (folder / "services.json").write_text(json.dumps({"schema": 1, "url": None, **content}))


def test_a_run_folder_says_where_and_who_should_be_there(
    board: Board, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dynamo_mpi-7"
    run_dir = describe(folder)
    monkeypatch.delenv("ETCD_ENDPOINTS")
    code, _, err = run()
    assert code == ExitCode.UNAVAILABLE
    assert f"the services of the deployment in {folder} aren't up yet" in err

    with running_nats() as nats, closed_port() as port:
        url = f"http://127.0.0.1:{port}"
        serve(
            folder,
            url=url,
            environment={"ETCD_ENDPOINTS": board.url, "NATS_SERVER": nats, "NATS_AUTH_PASSWORD": "s3cret"},
        )
        board.worker("prefill", phase="serve", launch="d-prefill-0")
        code, out, _ = run()
        found = as_json(run, "--run-dir", str(folder))
    assert code == 0
    assert [line.split()[1:4] for line in out.splitlines()[1:3]] == [
        ["prefill-0", "TP8", "prefill1,prefill2"],
        ["decode-0", "-", "n1"],
    ]
    assert f"services: etcd up at {board.url}, nats up at {nats}, frontend DOWN at {url}" in out
    assert "s3cret" not in out + json.dumps(found)
    assert (found["ok"], found["run_dir"]) == (False, str(folder))
    assert found["missing"] == [{"name": "decode-0", "role": "decode", "nodes": ["n1"]}]
    assert found["launcher"]["gone"] is False

    run_dir.write_end(75, "decode-0 ended with exit code 75")
    run_dir.close()
    code, out, _ = run("--run-dir", str(folder))
    assert code == 0
    assert "the last deployment ended 0 s ago with exit code 75: decode-0 ended with exit code 75" in out
    found = as_json(run, "--run-dir", str(folder))
    assert (found["ok"], found["ended"]["exit_code"], found["workers"]) == (False, 75, [])
    RunDir(folder).close()
    assert "ended.json" not in os.listdir(folder)
    assert run("--run-dir", str(folder))[0] == ExitCode.UNAVAILABLE


def test_spares_nodes_left_out_and_a_worker_that_was_given_up(board: Board, run: Run, tmp_path: Path) -> None:
    worker = {"name": "decode-1", "role": "decode", "nodes": ["n4"], "ranks": 2, "launch": "d-decode-1"}
    lost = {"node": "n4", "reason": "it doesn't answer", "time": time.time(), "worker": "decode-1"}
    run_dir = describe(
        tmp_path / "run",
        workers=[
            {"name": "decode-0", "role": "decode", "nodes": ["n3"], "ranks": 2, "launch": "d-decode-0", "restarts": 2},
            {**worker, "given_up": "no spare node is left"},
        ],
        spares=[{"node": "n8", "state": "used", "reason": "decode-0"}, {"node": "n9", "state": "ready", "reason": ""}],
        excluded=[lost],
        drained=[{"node": "n3", "reason": "Slurm says drain"}],
        max_restarts=3,
    )
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    board.worker("decode", phase="serve", launch="d-decode-0")
    _, out, _ = run("--run-dir", str(run_dir.path))
    assert "spare nodes: n8 used (decode-0), n9 ready\n" in out
    assert "left out: n4 (it doesn't answer); for a next launch: take n4 out of the hostfile\n" in out
    assert "warning: n3 is drained: Slurm says drain; dynamo-mpi replace n3 moves its worker\n" in out
    assert "warning: decode-1 is given up: no spare node is left\n" in out
    run_dir.describe({**json.loads((run_dir.path / "deployment.json").read_text()), "job_id": "7"})
    _, out, _ = run("--run-dir", str(run_dir.path))
    assert "left out: n4 (it doesn't answer); for a next job: --exclude=n4\n" in out
    assert any(line.split()[:5] == ["-", "decode-1", "-", "n4", "given"] for line in out.splitlines())
    found = as_json(run, "--run-dir", str(run_dir.path))
    # what is left serves, but it isn't what was asked for
    assert (found["ok"], found["ready"], found["missing"]) == (False, True, [])
    assert found["excluded"] == [lost]
    assert (found["restarts"][0], found["max_restarts"]) == ({"name": "decode-0", "count": 2}, 3)
    run_dir.close()


@pytest.mark.parametrize(
    ("changes", "known"),
    [({"time": 10**400}, None), ({"time": True}, None), ({"exit_code": 256}, 1), ({"exit_code": "x"}, 0)],
)
def test_an_end_that_makes_no_sense(tmp_path: Path, changes: dict[str, Any], known: int | None) -> None:
    content = {"schema": 1, "exit_code": 66, "report": "", "time": 1.0, **changes}
    (tmp_path / "ended.json").write_text(json.dumps(content))
    ended = find_deployment(tmp_path, {}).end
    assert (None if ended is None else ended.exit_code) == known


def test_what_a_worker_died_of_breaks_no_terminal(board: Board, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_dir = describe(folder)
    run_dir.write_end(66, "no \x1b[2Jweights")
    run_dir.close()
    text = run("--run-dir", str(folder))[1]
    assert "\x1b" not in text
    assert text.endswith("with exit code 66: no \\x1b[2Jweights\n")


def test_a_launcher_that_was_killed(board: Board, run: Run, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    run_dir = describe(tmp_path / "run", pid=gone.pid)
    serve(run_dir.path, environment={"ETCD_ENDPOINTS": board.url})
    for role in ("prefill", "decode"):
        board.worker(role, phase="serve", launch=f"d-{role}-0")
    assert as_json(run, "--run-dir", str(run_dir.path))["ok"] is True, (
        "the lock is held, from within a container perhaps"
    )
    os.close(run_dir._lock)
    assert "its launcher was killed" in run("--run-dir", str(run_dir.path))[1]
    assert as_json(run, "--run-dir", str(run_dir.path))["ok"] is False
    (run_dir.path / "services.json").unlink()
    code, _, err = run("--run-dir", str(run_dir.path))
    assert (code, f"the launcher of the deployment in {run_dir.path} was killed" in err) == (75, True), err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"workers": [7], "pid": "x", "job_id": {}}', '{"workers": 7}', '{"workers": [{"nodes": 7}]}'],
)
def test_files_of_a_run_folder_that_make_no_sense(board: Board, run: Run, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "deployment.json").write_text(text)
    (folder / "services.json").write_text(text)
    (folder / "ended.json").write_text(text)
    code, _, err = run("--run-dir", str(folder))
    assert (code, f"{folder}/services.json can't be used: " in err) == (ExitCode.DATA, True)
    assert "Traceback" not in err


def test_of_several_deployments_one_must_be_named(
    board: Board, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dynamo_mpi-1", "dynamo_mpi-2"):
        os.close(describe(tmp_path / name)._lock)
    assert run()[0] == 0, "the environment says where"
    monkeypatch.delenv("ETCD_ENDPOINTS")
    code, _, err = run()
    assert (code, "2 deployments run in folders of" in err) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("value", ["0", "x", "nan", "inf", "1e300"])
def test_a_period_that_is_none(board: Board, run: Run, value: str) -> None:
    code, out, _ = run("--watch", value, "--output", "json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (ExitCode.USAGE, 64)


class Watching:
    """`dynamo-mpi status --watch`, on a terminal or into a pipe."""

    def __init__(self, board: Board, *words: str, terminal: bool) -> None:
        self._master, slave = pty.openpty() if terminal else os.pipe()
        command = [sys.executable, "-m", "dynamo_mpi", "status", "--watch", "0.1", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ETCD_ENDPOINTS": board.url, "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE
        )
        os.close(slave)
        self.text = ""

    def until(self, words: str) -> None:
        """Read until it has written this."""
        end = time.monotonic() + 20
        while words not in self.text and self._read():
            assert time.monotonic() < end, self.text
        assert words in self.text, self.text

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """End it; return its exit code, and what it said on stderr."""
        self.process.send_signal(number)
        while self._read():
            pass
        os.close(self._master)
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            said = stderr.read().decode()
        return self.process.wait(20), said

    def _read(self) -> bool:
        try:
            part = os.read(self._master, 65536)
        except OSError:  # a terminal whose other side has been closed
            return False
        self.text += part.decode()
        return bool(part)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_watch_redraws_a_terminal_and_leaves_it_as_it_was(board: Board, number: signal.Signals, code: int) -> None:
    board.worker("agg", phase="load")
    watching = Watching(board, terminal=True)
    watching.until("load")
    board.worker("agg", phase="serve", model=HOSTILE)
    watching.until("serve")
    assert watching.end(number) == (code, "")
    text = watching.text
    assert text.startswith("\x1b[?1049h\x1b[?7l\x1b[?25l\x1b[Hdynamo-mpi status, every 0.1 s")
    inside, _, after = text.partition("\x1b[?25h\x1b[?7h\x1b[?1049l")
    assert inside.count("\x1b[H") >= 2
    assert "serve" in after, "the last state stays"
    assert "\x1b]0;" not in text
    assert "\x1b[2J" not in text


def test_watch_goes_on_where_etcd_is_away(board: Board) -> None:
    with closed_port() as port:
        silent = Board.__new__(Board)
        silent.url = f"http://127.0.0.1:{port}"
        watching = Watching(silent, "--output", "json", terminal=False)
        watching.until('"exit_code": 69')
        assert watching.process.poll() is None
        assert watching.end(signal.SIGINT) == (0, "")


def test_watch_appends_lines_of_json_to_a_pipe(board: Board) -> None:
    board.worker("agg", phase="load")
    watching = Watching(board, "--output", "json", terminal=False)
    watching.until("\n")
    board.worker("agg", phase="serve")
    watching.until('"serve"')
    assert watching.end(signal.SIGINT) == (0, "")
    phases = [json.loads(line)["workers"][0]["phase"] for line in watching.text.splitlines()]
    assert (phases[0], phases[-1]) == ("load", "serve")


def test_watch_ends_with_its_reader(board: Board) -> None:
    watching = Watching(board, terminal=False)
    watching.until("no worker is there")
    os.close(watching._master)
    assert watching.process.wait(20) == 141


def test_no_package_is_needed(board: Board) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from dynamo_mpi.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {name.partition('.')[0] for name in sys.modules} & {'grpc', 'pyetcd', 'yaml', 'mpi4py', 'numpy', 'nats'};"
        "sys.exit(code)"
    )
    words = [sys.executable, "-I", "-S", "-c", program, str(ROOT), "status", "--output", "json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    assert (done.returncode, json.loads(done.stdout)["workers"]) == (0, []), done.stderr
