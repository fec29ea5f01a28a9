# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi wait`, `status` and `down` of real workers behind a real frontend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import ROOT
from tests.dynamo.local_command import LocalCommand
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_launch import LaunchCommand

pytestmark = pytest.mark.dynamo
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMP_NUM_THREADS": "1"}


def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command of ours, in an environment that says nothing else of where things are."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "dynamo_mpi", *words]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Wait for its end; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def shown(*words: str, **environment: str) -> dict[str, Any]:
    """Return what `status` says."""
    code, out, err = ended(begin("status", "--output", "json", *words, **environment))
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def test_a_worker_without_a_launch(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> None:
    place = {"ETCD_ENDPOINTS": etcd.url}
    with running_frontend(tmp_path, etcd) as frontend:
        waiting = begin("wait", "--frontend", frontend.url, "--output", "json", **place)
        assert ended(begin("wait", "--timeout", "0.2", **place))[0] == 124
        worker = RunningWorker(tmp_path, etcd, model_dir, 3, "--engine", "reference", **UNBOUND)
        try:
            code, out, err = ended(waiting)
            assert code == 0, err + worker.text()
            ready = json.loads(out)
            (model,) = ready["completions"]
            assert (ready["ok"], ready["completions"][model]["tokens"] > 0) == (True, True)
            (row,) = shown(**place)["workers"]
            assert (row["role"], row["phase"], row["model"], row["layout"]["text"]) == ("agg", "serve", model, "TP3")
            assert row["pid"] == worker.rank_zero()
            assert shown("--namespace", "other", **place)["workers"] == []

            assert ended(begin("down", "--namespace", "other", **place))[0] == 0
            code, out, err = ended(begin("down", "--model", model, "--dry-run", **place))
            assert (code, f"kill -TERM {worker.rank_zero()}" in out) == (0, True), err
            assert worker.process.poll() is None
            code, _, err = ended(begin("down", "--model", model, **place))
            assert code == 0, err
            assert worker.wait(20) == 0, worker.text()
            assert "drain: deregistered" in worker.text()
            assert shown(**place)["workers"] == etcd.keys() == []
        finally:
            worker.stop()


def test_a_deployment_from_before_its_start_to_its_end(tmp_path: Path, model_dir: Path) -> None:
    run_dir = str(tmp_path / "run")
    waiting = begin("wait", "--run-dir", run_dir)
    with LaunchCommand(tmp_path, model_dir, "--skip-check") as launch:
        code, out, err = ended(waiting)
        assert code == 0, err + launch.err
        assert "smollm2: prefill, decode; a completion came back" in out
        assert launch.ask()[0] == 200

        code, out, err = ended(begin("status", "--run-dir", run_dir))
        assert code == 0, err
        head, *rows = (line.split() for line in out.splitlines()[:3])
        assert head[:2] == ["model", "worker"]
        assert [(row[0], row[1], row[2]) for row in rows] == [
            ("smollm2", f"{role}-0", "TP1") for role in ("prefill", "decode")
        ]
        found = shown("--run-dir", run_dir)
        assert (found["ok"], found["ready"], found["missing"]) == (True, True, []), found
        assert [(service["name"], service["up"]) for service in found["services"]] == [
            ("etcd", True),
            ("nats", True),
            ("frontend", True),
        ]
        assert "PRIVATE KEY" not in json.dumps(found)

        code, _, err = ended(begin("down", "--run-dir", run_dir))
        assert (code, launch.wait(10)) == (0, 0), err
        launch.assert_nothing_left()
        ending = shown("--run-dir", run_dir)
        assert (ending["ok"], ending["ended"]["exit_code"]) == (True, 0)


def test_a_worker_that_ended_on_request_is_not_waited_for(tmp_path: Path, model_dir: Path) -> None:
    run_dir = str(tmp_path / "run")
    with LaunchCommand(tmp_path, model_dir, "--skip-check") as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        os.kill(launch.rank("prefill-0"), signal.SIGTERM)
        launch.wait_for_text("prefill-0: ended with 0 on request; it isn't restarted")
        code, _, err = ended(begin("wait", "--run-dir", run_dir), 30)
        assert (code, "prefill-0: ended on request, and launch doesn't restart" in err) == (75, True), err
        found = shown("--run-dir", run_dir)
        assert [worker["name"] for worker in found["departed"]] == ["prefill-0"]
        assert (found["ok"], found["ready"], found["missing"]) == (False, False, [])
        assert "ended on request" in ended(begin("status", "--run-dir", run_dir))[1]
        # what is still there is ready by itself
        assert ended(begin("wait", "--run-dir", run_dir, "--role", "decode"), 30)[0] == 0
        assert launch.end() == 143, launch.err
        launch.assert_nothing_left()


def roles_in_timeline(run_dir: str, page: Path) -> list[str]:
    """Return whose starts `dynamo-mpi timeline` draws."""
    code, _, err = ended(begin("timeline", "--run-dir", run_dir, "-o", str(page)))
    assert code in (0, 64), err
    return [start.role for start in read_traces(page)] if code == 0 else []


def test_status_wait_timeline_and_down_find_a_local_stack(tmp_path: Path) -> None:
    with LocalCommand(tmp_path, "--tp", "1", "--keep", "--output", "json") as command:
        run_dir = command.report()["run_dir"]
        command.wait_for_text("serving until")
        assert f"dynamo-mpi down {run_dir}" in command.err
        found = shown("--run-dir", run_dir)
        assert (found["ok"], found["ready"], [worker["name"] for worker in found["workers"]]) == (
            True,
            True,
            ["worker"],
        )
        assert ended(begin("wait", "--run-dir", run_dir), 30)[0] == 0
        eventually(lambda: roles_in_timeline(run_dir, tmp_path / "start.html") == ["launch", "agg"], "a timeline", 30)
        code, _, err = ended(begin("down", run_dir), 60)
        assert (code, command.wait(10)) == (0, 0), err + command.err
        assert "asked to stop" in command.err
        command.assert_nothing_left()
    assert ended(begin("status", "--run-dir", run_dir))[0] == 64


def test_a_worker_that_fails_gives_the_wait_its_exit_code(tmp_path: Path, model_dir: Path) -> None:
    run_dir = str(tmp_path / "run")
    fault = "rank0:load:kill"
    with LaunchCommand(tmp_path, model_dir, "--skip-check", DYN_MPI_FAULT=fault, DYN_MPI_ALLOW_FAULTS="1") as launch:
        code, out, err = ended(begin("wait", "--run-dir", run_dir, "--output", "json"))
        assert (code, json.loads(out)["error"]["exit_code"]) == (137, 137), err + launch.err
        assert launch.wait() == 137, launch.err
        assert shown("--run-dir", run_dir)["ok"] is False
        eventually(lambda: not launch.survivors(), "no process is left", 10)


@pytest.mark.landing("1")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_without_a_launch_gives_the_wait_its_exit_code(
    rank: int, tmp_path: Path, etcd: EtcdServer, model_dir: Path
) -> None:
    place = {"ETCD_ENDPOINTS": etcd.url}
    waiting = begin("wait", "--output", "json", **place)
    fault = {"DYN_MPI_FAULT": f"rank{rank}:load:kill", "DYN_MPI_ALLOW_FAULTS": "1"}
    worker = RunningWorker(tmp_path, etcd, model_dir, 3, "--engine", "reference", **UNBOUND, **fault)
    try:
        code, out, err = ended(waiting)
        # as all ranks leave with it
        assert (code, json.loads(out)["ok"]) == (70, False), err + worker.text()
        assert f"exit code 70 in load, rank {rank} on " in err
        assert worker.wait() != 0
        (failure,) = shown(**place)["failures"]
        assert (failure["role"], failure["rank"], failure["followed"]) == ("agg", rank, False)

        again = RunningWorker(tmp_path, etcd, model_dir, 3, "--engine", "reference", name="again", **UNBOUND)
        try:
            code, _, err = ended(begin("wait", **place))
            assert code == 0, err + again.text()
            found = shown(**place)
            assert (found["ok"], found["failures"][0]["followed"]) == (True, True)
            assert "[started again]" in ended(begin("status", **place))[1]
        finally:
            again.stop()
    finally:
        worker.stop()
