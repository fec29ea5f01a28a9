# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi launch` by mpirun and a hostfile: a real pair and real services on this machine, under two of its names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.ops.listeners import Reach, find_listeners
from dynamo_mpi.stage.store import Store
from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import ROOT, find_mpirun, mpi_environment
from tests.dynamo.marked_command import MarkedCommand
from tests.dynamo.running import eventually, pem_lines, started_with
from tests.unit.neighbour import needs_root

pytestmark = pytest.mark.dynamo
# one rank of each role on each "host"
# a worker, which has its time to say that it is leaving, after the other, and the services
STOPPED_SECONDS = 20.0
CONFIG = "tensor_parallel_size: 1\nmax_seq_len: 512\nmax_batch_size: 4\n"


class LaunchCommand(MarkedCommand):
    """`dynamo-mpi launch` of a prefill and a decode worker of one rank each."""

    def __init__(
        self,
        folder: Path,
        model_dir: Path,
        *words: str,
        stderr: int | None = None,
        spares: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.run_dir = folder / "run"
        (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in ("localhost", "127.0.0.1", *spares)))
        (folder / "engine.yaml").write_text(CONFIG)
        command = [
            *(sys.executable, "-m", "dynamo_mpi", "launch", "--hostfile", str(folder / "hosts")),
            *("--run-dir", str(self.run_dir), "--mpirun", find_mpirun(), "--gpus-per-node", "1"),
            *("--model", str(model_dir), "--served-model-name", "smollm2", "--engine", "reference"),
            *("--prefill-engine-config", str(folder / "engine.yaml")),
            *("--decode-engine-config", str(folder / "engine.yaml"), *words),
        ]
        # one host under two names can't distinguish the check's ranks
        variables = {
            "DYN_MPI_KV_CHECK": "off",
            "DYN_MPI_ADDRESS": "127.0.0.1",
            "DYN_LOG": "error",
            "no_proxy": "*",
            **environment,
        }
        super().__init__(folder, command, {**mpi_environment(), **variables}, stderr=stderr)

    def ask(self) -> tuple[int, Any]:
        """Ask for the capital of France; return the status and the answer."""
        url = json.loads((self.run_dir / "services.json").read_text())["url"]
        question = {"role": "user", "content": "What is the capital of France?"}
        body = {"model": "smollm2", "messages": [question], "max_tokens": 16}
        request = urllib.request.Request(  # noqa: S310 - our own loopback address
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310 - the same
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def rank(self, name: str) -> int:
        """Return the process of a worker's only rank."""
        return int(self.ready(name)["pid"])

    def ready(self, name: str) -> dict[str, Any]:
        """Return what a worker that serves has written."""
        content: dict[str, Any] = json.loads((self.run_dir / "ready" / f"{name}.json").read_text())
        return content

    def assert_nothing_left(self) -> None:
        """No process, no key, no word of readiness."""
        assert self.process.poll() is not None
        eventually(lambda: not self.survivors(), "no process is left", 10)
        # a report of a failure goes with the worker's next start
        kept = {"ended.json", "lock", "logs", "ready", "services", "timeline"}
        assert {path.name for path in self.run_dir.iterdir()} - {"failures"} == kept
        assert not list((self.run_dir / "ready").iterdir())


def test_a_pair_answers_and_a_failed_worker_comes_back(tmp_path: Path, model_dir: Path) -> None:
    with LaunchCommand(tmp_path, model_dir, "--max-restarts", "1") as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        status, reply = launch.ask()
        assert (status, reply["choices"][0]["message"]["content"]) == (200, "The capital of France is Paris.")
        environment = json.loads((launch.run_dir / "services.json").read_text())["environment"]
        secrets = [environment["NATS_AUTH_PASSWORD"], *pem_lines(environment["ETCD_AUTH_CLIENT_KEY"])]
        # launch, head node, etcd, NATS, frontend; mpirun, rank and agent of each worker
        pids = launch.survivors()
        assert len(pids) >= 11
        assert started_with(pids, secrets) == {}
        found = find_listeners(pids)
        assert {each.kind for each in found} == {"etcd", "NATS", "frontend", "rank", "mpirun"}
        assert [each for each in found if not each.rows] == []
        assert {each.kind for each in found if each.reach is Reach.EVERYWHERE} == {"mpirun"}

        os.kill(launch.rank("prefill-0"), signal.SIGKILL)
        launch.wait_for_text("prefill-0: ended with exit code 137; start 2 of at most 2")
        launch.wait_for_text("prefill-0: ready", times=2)
        ready = {name: launch.ready(name)["attempt"] for name in ("prefill-0", "decode-0")}
        assert ready == {"prefill-0": 2, "decode-0": 1}
        eventually(lambda: launch.ask()[0] == 200, "it answers again", 30)

        down = [str(ROOT / "scripts" / "stop.sh"), str(launch.run_dir)]
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
        done = subprocess.run(down, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, launch.wait(10)) == (0, 0), done.stderr + launch.err
        assert "drain: deregistered" in launch.err
        launch.assert_nothing_left()
        starts = {path.stem: read_traces(path)[0] for path in (launch.run_dir / "timeline").glob("*.html")}
        drawn = {name: (start.role, start.attempt, start.outcome) for name, start in starts.items()}
        assert drawn == {
            "prefill-0": ("prefill", 2, "ended"),
            "prefill-0.1": ("prefill", 1, "failed"),
            "decode-0": ("decode", 1, "ended"),
        }
        (launcher,) = read_traces(launch.run_dir / "timeline" / "launch.json")
        assert [span.phase for span in launcher.ranks[0].spans] == ["check", "services", "prefill-0 recovery"]
        picture = subprocess.run(
            [sys.executable, "-m", "dynamo_mpi", "timeline", "--run-dir", str(launch.run_dir)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "failed: rank 0 on " in picture
        assert "was killed by signal 9 (SIGKILL)" in picture
        assert "prefill-0 recovery" in picture


@needs_root
@pytest.mark.parametrize("words", [(), ("--mpirun", f"{find_mpirun()} --allow-run-as-root")])
def test_an_mpirun_that_refuses_root_is_named_before_anything_starts(tmp_path: Path, words: Sequence[str]) -> None:
    with LaunchCommand(tmp_path, tmp_path, *words, OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="") as launch:
        code = launch.wait(60)
    if words:
        assert (code, "check refused" in launch.err) == (66, True), "there is no model, and that is all"
        return
    assert code == 64
    assert launch.err == (
        f"dynamo-mpi: {find_mpirun()} refuses to run as root\n"
        "  expected: a user other than root; or, as in a container, both variables with which Open MPI allows it\n"
        "  fix:      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n"
    )
    assert {path.name for path in launch.run_dir.iterdir()} == {"ended.json", "lock"}


@pytest.mark.full
def test_both_workers_on_a_host_use_one_staged_copy(tmp_path: Path, model_dir: Path) -> None:
    # the fixture's has links out of its folder
    model = Path(shutil.copytree(model_dir, tmp_path / "models" / model_dir.name))
    local = tmp_path / "local"
    with LaunchCommand(tmp_path, model, "--stage-dir", str(local)) as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        status, reply = launch.ask()
        assert (status, reply["choices"][0]["message"]["content"]) == (200, "The capital of France is Paris.")
        store = Store(str(local))
        (entry,) = store.entries()
        assert (entry.complete, entry.in_use, entry.source) == (True, True, str(model))
        logs = [(launch.run_dir / "logs" / f"{name}-0.log").read_text() for name in ("prefill", "decode")]
        assert sorted("had the model already" in log for log in logs) in ([False, True], [False, False])
        assert all(f"in {store.copy_path(entry.name)}" in log for log in logs), logs
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(30) == 130
        assert not store.entries()[0].in_use


@pytest.mark.full
def test_a_host_that_is_blamed_twice_is_replaced_by_a_spare(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(("192.0.2.1", 9))  # nothing is sent
        spare = str(way.getsockname()[0])
    words = ("--spare-nodes", "1", "--skip-check")
    with LaunchCommand(tmp_path, model_dir, *words, spares=[spare]) as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        assert (launch.run_dir / "logs" / f"spare-{spare}.log").exists()
        os.kill(launch.rank("decode-0"), signal.SIGKILL)
        launch.wait_for_text("start 2 of at most 4 in an hour, at once")
        launch.wait_for_text("decode-0: ready", times=2)
        assert launch.err.count("decode-0: 1 rank on 127.0.0.1") == 2
        os.kill(launch.rank("decode-0"), signal.SIGKILL)
        launch.wait_for_text("127.0.0.1 is left out (2 failures within an hour began there; the last one: ")
        launch.wait_for_text("decode-0: ready", times=3)
        assert f"decode-0: 1 rank on {spare}" in launch.err
        assert launch.ready("decode-0")["attempt"] == 3
        eventually(lambda: launch.ask()[0] == 200, "it answers again", 30)
        # without a further spare a worker that is alone in its role stays
        (launch.run_dir / "replace").mkdir(mode=0o700)
        (launch.run_dir / "replace" / spare).touch(mode=0o600)
        launch.wait_for_text(f"replace {spare} of decode-0: refused (no spare node is left")
        assert launch.end() == 143, launch.err
        assert "for a next launch: take 127.0.0.1 out of " in launch.err
        left = json.loads((launch.run_dir / "excluded.json").read_text())["nodes"]
        assert [(one["node"], one["worker"]) for one in left] == [("127.0.0.1", "decode-0")]


def test_a_worker_with_no_process_left_is_reported_by_launch(tmp_path: Path, model_dir: Path) -> None:
    with LaunchCommand(tmp_path, model_dir, "--skip-check") as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        # the rank, its node agent and what else they have started
        members = [pid for pid in launch.survivors() if is_of_prefill(pid)]
        assert launch.rank("prefill-0") in members
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in members:
                os.kill(pid, number)
        assert launch.wait() == 137, launch.err
        message = "prefill-0 ended with exit code 137: rank 0 on "
        assert launch.err.count(message) == 1, launch.err
        assert "was killed by signal 9 (SIGKILL), and no rank was left to report it\n  expected: " in launch.err
        assert message in json.loads((launch.run_dir / "ended.json").read_text())["report"]
        (written,) = (launch.run_dir / "failures" / "prefill-0").iterdir()
        assert json.loads(written.read_text())["cause"] == "disconnect"
        launch.assert_nothing_left()


def is_of_prefill(pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    is_rank = any(variable.startswith(b"PMIX_RANK=") for variable in variables)
    return is_rank and any(variable.endswith(b"-prefill-0") for variable in variables)


@pytest.mark.full
def test_a_stopped_mpirun_holds_nothing_up(tmp_path: Path, model_dir: Path) -> None:
    with LaunchCommand(tmp_path, model_dir, "--skip-check") as launch:
        launch.wait_for_text("ready: smollm2. Try:")
        for pid, words in launch.command_lines().items():
            if words[0].endswith((b"mpirun", b"prterun")):
                os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        assert launch.end() == 143, launch.err
        assert time.monotonic() - began < STOPPED_SECONDS
        assert "cancelling" not in launch.err
        launch.assert_nothing_left()


def test_a_worker_that_fails_ends_all_with_its_exit_code(tmp_path: Path, model_dir: Path) -> None:
    with LaunchCommand(tmp_path, model_dir, "--", "--kv-network", "203.0.113.0/24") as launch:
        assert launch.wait() == 64, launch.err
        assert "ended with exit code 64" in launch.err
        assert "error in load: " in launch.err and "203.0.113.0/24" in launch.err
        launch.assert_nothing_left()


@pytest.mark.full
def test_a_fault_on_demand_reaches_the_ranks(tmp_path: Path, model_dir: Path) -> None:
    fault = "rank0:load:exit3"
    with LaunchCommand(tmp_path, model_dir, DYN_MPI_FAULT=fault, DYN_MPI_ALLOW_FAULTS="1") as launch:
        assert launch.wait() == 3, launch.err
        assert "fault: exit 3 in load" in launch.err
        assert "ended with exit code 3" in launch.err
        eventually(lambda: not launch.survivors(), "no process is left", 10)


def test_a_second_signal_ends_all_at_once(tmp_path: Path, model_dir: Path) -> None:
    with LaunchCommand(tmp_path, model_dir, "--stop-timeout", "60") as launch:
        launch.wait_for_text("prefill-0: 1 rank on localhost")
        launch.process.send_signal(signal.SIGTERM)
        launch.wait_for_text("ending")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait(30) == 143, launch.err
        launch.assert_nothing_left()


def test_it_ends_in_order_when_the_reader_of_its_output_has_gone(tmp_path: Path, model_dir: Path) -> None:
    # as `launch 2>&1 | tee log` does at Ctrl-C, which ends tee as well
    read, write = os.pipe()
    with (
        LaunchCommand(tmp_path, model_dir, "--skip-check", stderr=write) as launch,
        open(read, encoding="utf-8") as words,
    ):
        os.close(write)
        while "ready: smollm2. Try:" not in (line := words.readline()):
            assert line, "it has ended"
        words.close()
        assert launch.end(signal.SIGINT) == 130
        for worker in ("prefill-0", "decode-0"):
            assert "drain: deregistered" in (launch.run_dir / "logs" / f"{worker}.log").read_text()
        launch.assert_nothing_left()
