# SPDX-License-Identifier: Apache-2.0
"""A deployment with a spare node: a rank that is killed comes back in place, a node that is lost is replaced; the others serve on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.telemetry.startup_trace import read_traces
from tests.conftest import ROOT
from tests.dynamo.running import eventually

from .conftest import MakeSlurm
from .deployment import Deployment
from .session import SlurmSession
from .test_deployment import answer, settings

pytestmark = [pytest.mark.slurm, pytest.mark.dynamo]
CONFIG = "/mnt/engine_configs/smollm2/tp1.yaml"
# no test waits for Slurm's own discovery
NODE_TIMEOUT = 300


@pytest.fixture
def slurm(make_slurm: MakeSlurm) -> Iterator[SlurmSession]:
    """A cluster of the test's own, as it loses a node."""
    session = make_slurm(nodes=4, node_timeout=NODE_TIMEOUT)
    yield session
    session.cluster.down()


@pytest.fixture
def deployment(slurm: SlurmSession, tmp_path: Path, model_dir: Path) -> Iterator[Deployment]:
    """A prefill worker on n1, two decode workers on n2 and n3, and the spare n4."""
    variables = settings(slurm, model_dir, 1, 1, CONFIG)
    variables |= {"NUM_DECODE_WORKERS": "2", "NUM_SPARE_NODES": "1", "SALLOC_NO_KILL": "set"}
    command = (str(ROOT / "scripts" / "srun_disaggregated.sh"), "--skip-check")
    found = Deployment(slurm, tmp_path, command, variables)
    yield found
    # a job that has lost a node ends when the node is back: the cluster goes, too
    with contextlib.suppress(ProcessLookupError):
        found.process.end()


@pytest.fixture
def unlike(slurm: SlurmSession, tmp_path: Path, model_dir: Path) -> Iterator[Deployment]:
    """The same with an engine config on each node's own file system: that of the spare is another one."""
    for node in slurm.nodes:
        root = Path(f"/proc/{slurm.cluster.init_pid(node)}/root")
        text = (ROOT / "engine_configs" / "smollm2" / "tp1.yaml").read_text()
        (root / "dev/shm/engine.yaml").write_text(text + "# of its own\n" * (node == "n4"))
    variables = settings(slurm, model_dir, 1, 1, "/dev/shm/engine.yaml")
    variables |= {"NUM_SPARE_NODES": "1", "SALLOC_NO_KILL": "set", "NUM_DECODE_WORKERS": "2"}
    command = (str(ROOT / "scripts" / "srun_disaggregated.sh"), "--skip-check")
    found = Deployment(slurm, tmp_path, command, variables)
    yield found
    with contextlib.suppress(ProcessLookupError):
        found.process.end()


def test_a_spare_with_another_engine_config_is_known_before_it_is_needed_and_no_worker_moves_there_by_request(
    unlike: Deployment,
) -> None:
    unlike.wait_for_text("ready: smollm2. Try:")
    doubt = "P2: /dev/shm/engine.yaml differs from that on n"

    def spare() -> tuple[str, str]:
        (found,) = status(unlike)["spares"]
        return found["state"], found["reason"]

    eventually(lambda: f"the last choice for prefill-0: {doubt}" in spare()[1], "the spare is compared", 30)
    assert spare()[0] == "ready"
    words = (sys.executable, "-m", "dynamo_mpi", "replace", "n2", "--run-dir", unlike.run_dir)
    done = unlike.slurm.exec(*words, env={"PYTHONPATH": str(ROOT)})
    # the other decode worker serves, so that this one needn't start again
    assert done.returncode == 0, done.stdout + done.stderr
    assert "and no spare is left; not fit for decode-0: n4 (P2: " in json.dumps(status(unlike))
    os.kill(unlike.launcher(), signal.SIGINT)
    assert unlike.wait() == 130, unlike.text()


def status(deployment: Deployment) -> dict[str, Any]:
    words = (sys.executable, "-m", "dynamo_mpi", "status", "--output", "json", "--run-dir", deployment.run_dir)
    done = deployment.slurm.exec(*words, env={"PYTHONPATH": str(ROOT)})
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def said_after(text: str, first: str, second: str) -> float:
    """Return the seconds between two lines of the launcher."""
    times = [re.search(rf"^ *([\d.]+) s  .*{re.escape(words)}", text, re.MULTILINE) for words in (first, second)]
    assert all(times), (first, second, text)
    begin, end = (float(found[1]) for found in times if found is not None)
    return end - begin


def test_a_killed_rank_comes_back_in_place_and_a_lost_node_is_replaced(
    deployment: Deployment, slurm: SlurmSession
) -> None:
    deployment.wait_for_text("ready: smollm2. Try:")
    assert answer(deployment) == "The capital of France is Paris."
    eventually(lambda: status(deployment)["spares"] == [{"node": "n4", "state": "ready", "reason": ""}], "ready", 30)

    (rank,) = deployment.pids_of("n2", "dynamo_mpi.worker")
    os.kill(rank, signal.SIGKILL)
    deployment.wait_for_text("start 2 of at most 4 in an hour, at once")
    eventually(lambda: deployment.text().count("decode-0: ready") == 2, "it is ready again", 60)
    assert deployment.text().count("decode-0: 1 rank on n2") == 2
    # the spare was compared with the workers, and is like them
    assert json.loads((deployment.run_dir / "spares" / "n4.json").read_text())["host"] == "n4"
    assert not (deployment.run_dir / "excluded.json").exists()

    began = time.monotonic()
    slurm.kill_node("n3")
    deployment.wait_for_text("n3 is left out (it doesn't answer for ", 30)
    found = time.monotonic() - began
    deployment.wait_for_text("n4 takes its place")
    eventually(lambda: deployment.text().count("decode-1: ready") == 2, "it is ready on the spare", 60)
    assert "decode-1: 1 rank on n4" in deployment.text()
    # SlurmdTimeout is far away
    assert found < 20
    assert answer(deployment) == "The capital of France is Paris."
    now = status(deployment)
    assert [(one["node"], one["worker"]) for one in now["excluded"]] == [("n3", "decode-1")]
    assert now["spares"] == [{"node": "n4", "state": "used", "reason": "decode-1"}]
    assert deployment.text().count("prefill-0: ready") == 1
    written = json.loads((deployment.run_dir / "excluded.json").read_text())
    assert [one["node"] for one in written["nodes"]] == ["n3"]
    (earlier,) = read_traces(deployment.run_dir / "timeline" / "decode-0.1.html")
    assert (earlier.attempt, earlier.outcome) == (1, "failed")
    (launcher,) = read_traces(deployment.run_dir / "timeline" / "launch.json")
    assert [span.phase for span in launcher.ranks[0].spans][-2:] == ["decode-0 recovery", "decode-1 recovery"]

    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    assert "for a next job: --exclude=n3" in deployment.text()
    assert said_after(deployment.text(), "it doesn't answer for", "decode-1: 1 rank on n4") < 10
