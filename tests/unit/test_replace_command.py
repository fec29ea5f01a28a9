# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi replace`: what it requests in the run folder, what it prints of launch's answers, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.deploy.replacements import HEAD_NODE
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.ops import replace
from tests.dynamo.running import eventually

Run = Callable[..., tuple[int, str, str]]
DECODE = [("decode-0", "decode", ["n2", "n3"]), ("decode-1", "decode", ["n4"])]


class Launch:
    """A launch as its files show it, in this process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.run_dir = RunDir(folder)
        self.content: dict[str, Any] = {"job_id": "7", "host": os.uname().nodename, "pid": os.getpid()}
        self.describe()

    def describe(self, workers: Any = DECODE, **more: Any) -> None:
        own = [
            {"name": name, "role": role, "nodes": nodes, "ranks": len(nodes), "step": name, "launch": name, **rest}
            for name, role, nodes, *rests in [("prefill-0", "prefill", ["n1"]), *workers]
            for rest in [rests[0] if rests else {}]
        ]
        self.content = {**self.content, "workers": own, **more}
        self.run_dir.describe(self.content)

    def answers(self, *answers: dict[str, Any]) -> threading.Thread:
        """Take the next request, and give it these answers, one after the other."""

        def run() -> None:
            eventually(self.run_dir.take_replace_requests, "a request", 10)
            before = self.content.get("replacements", [])
            for answer in answers:
                self.run_dir.describe({**self.content, "replacements": [*before, answer]})
                threading.Event().wait(0.1)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    monkeypatch.setattr(replace, "POLL_SECONDS", 0.02)
    begun = Launch(tmp_path / "run")
    yield begun
    begun.run_dir.close()


@pytest.fixture
def run(launch: Launch, capsys: pytest.CaptureFixture[str]) -> Run:
    def begin(*words: str) -> tuple[int, str, str]:
        code = main(["replace", *words, "--run-dir", str(launch.path)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return begin


SPARE = [{"node": "n9", "state": "ready"}]


def test_a_node_is_replaced_by_a_spare(launch: Launch, run: Run) -> None:
    launch.describe(
        spares=SPARE,
        # of an earlier request for it
        replacements=[{"node": "n3", "state": "refused", "reason": "no"}],
    )
    whole = {"node": "n3", "worker": "decode-0", "to": "n9", "time": 5.0}
    states = ("waiting", "draining", "starting", "done")
    answering = launch.answers(*({**whole, "state": state} for state in states))
    code, out, said = run("n3")
    answering.join()
    assert code == 0, said
    assert out.startswith("n3 is out after ") and "decode-0 serves with n9 in its place" in out
    assert "dynamo-mpi replace: decode-0 drains\n" in said
    assert "dynamo-mpi replace: decode-0 starts with n9 in the place of n3\n" in said
    assert not list((launch.path / "replace").iterdir())


def test_a_repeated_request_waits_for_the_open_one(launch: Launch, run: Run) -> None:
    # the last spare is already taken for it
    whole = {"node": "n1", "worker": "prefill-0", "to": "n9", "time": 5.0}
    earlier = {"node": "n1", "state": "refused", "reason": "no"}
    launch.describe(spares=[{"node": "n9", "state": "used"}], replacements=[earlier, {**whole, "state": "draining"}])

    def end() -> None:
        eventually(launch.run_dir.take_replace_requests, "a request", 10)
        launch.describe(replacements=[earlier, {**whole, "state": "done"}])

    ending = threading.Thread(target=end)
    ending.start()
    code, out, said = run("n1", "--timeout", "20")
    ending.join()
    assert (code, "prefill-0 serves with n9 in its place" in out) == (0, True), said
    assert "dynamo-mpi replace: prefill-0 drains\n" in said


def test_a_spare_is_taken_out_at_once(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)
    answering = launch.answers({"node": "n9", "state": "done", "reason": "it was a spare"})
    assert run("n9")[:2] == (0, "n9 is out (it was a spare)\n")
    answering.join()


def test_what_launch_refuses_is_reported_with_its_reason(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)
    answering = launch.answers({"node": "n1", "state": "refused", "reason": "it is the head node"})
    code, _, said = run("n1")
    answering.join()
    assert (code, "launch doesn't take n1 out: it is the head node" in said, "fix:" in said) == (64, True, True), said


@pytest.mark.parametrize("node", ["n8", "../stop", "", "decode-0"])
def test_a_node_that_the_deployment_does_not_use_is_refused(launch: Launch, run: Run, node: str) -> None:
    launch.describe(spares=SPARE)
    code, _, said = run(node)
    assert (code, f"doesn't use a node {node!r}" in said) == (64, True), said
    assert "n2 (decode-0), n3 (decode-0), n4 (decode-1); spares n9" in said
    assert not (launch.path / "replace").exists() or not list((launch.path / "replace").iterdir())


@pytest.mark.parametrize("spares", [[], [{"node": "n9", "state": "used"}], [{"node": "n9", "state": "failed"}]])
def test_without_a_spare_the_only_worker_of_a_role_stays(launch: Launch, run: Run, spares: Any) -> None:
    launch.describe(spares=spares)
    code, _, said = run("n1")
    assert (code, "no spare node is left, and prefill-0 is the only prefill worker" in said) == (64, True), said


def test_without_a_spare_another_worker_of_the_role_is_enough(launch: Launch, run: Run) -> None:
    answering = launch.answers({"node": "n4", "worker": "decode-1", "state": "done", "reason": ""})
    code, out, said = run("n4")
    answering.join()
    assert (code, "decode-1 isn't started again" in out) == (0, True), said


@pytest.mark.parametrize("gone", [{"departed": 5.0}, {"given_up": "no spare"}])
def test_a_node_whose_worker_has_ended_is_refused(launch: Launch, run: Run, gone: dict[str, Any]) -> None:
    launch.describe([("decode-0", "decode", ["n2", "n3"]), ("decode-1", "decode", ["n4"], gone)], spares=SPARE)
    code, _, said = run("n4")
    assert (code, "decode-1 has ended" in said) == (64, True), said


def test_the_end_of_the_deployment_meanwhile_is_reported(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)

    def end() -> None:
        eventually(launch.run_dir.take_replace_requests, "a request", 10)
        (launch.path / "deployment.json").unlink()

    ending = threading.Thread(target=end)
    ending.start()
    code, _, said = run("n3")
    ending.join()
    assert (code, "has ended, before n3 was taken out" in said) == (75, True), said


def test_a_request_that_takes_too_long_says_how_far_it_is(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)
    answering = launch.answers(
        {"node": "n3", "worker": "decode-0", "state": "waiting", "reason": "until decode-1 serves"}
    )
    code, _, said = run("n3", "--timeout", "0.6")
    answering.join()
    assert (code, "decode-0 waits (until decode-1 serves)" in said) == (ExitCode.DEADLINE, True), said


def test_a_folder_without_a_deployment_is_refused(launch: Launch, run: Run) -> None:
    (launch.path / "deployment.json").unlink()
    code, _, said = run("n3")
    assert (code, "no deployment runs in" in said) == (64, True), said


def test_the_request_is_one_file_in_the_run_folder(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)
    assert run("n3", "--timeout", "0.2")[0] == ExitCode.DEADLINE
    assert launch.run_dir.take_replace_requests() == ["n3"]
    assert json.loads((launch.path / "deployment.json").read_text())["spares"] == SPARE


def test_a_launcher_that_was_killed_takes_no_request(launch: Launch, run: Run) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    launch.describe(pid=gone.pid)
    os.close(launch.run_dir._lock)
    code, _, said = run("n1")
    launch.run_dir._lock = os.open(os.devnull, os.O_RDONLY)  # for the fixture's end
    assert (code, f"the launcher of the deployment in {launch.path} was killed" in said) == (75, True), said
    assert f"dynamo-mpi down --run-dir {launch.path}" in said


def test_the_head_node_is_refused_with_what_moves_the_services(launch: Launch, run: Run) -> None:
    launch.describe(spares=SPARE)
    answering = launch.answers({"node": "n1", "state": "refused", "reason": HEAD_NODE})
    code, _, said = run("n1")
    answering.join()
    assert (code, "a new launch moves the services" in said, "--spare-nodes" in said) == (64, True, False), said
