# SPDX-License-Identifier: Apache-2.0
"""`launch` runs the KV check as a step over the nodes of both roles: what it reports, and that it refuses for a pair that is cut."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

from .deployment import Deployment
from .session import SlurmSession
from .shaping import lossy_link
from .test_deployment import settings

pytestmark = pytest.mark.slurm
CONFIG = "/mnt/engine_configs/smollm2/tp1.yaml"


@pytest.fixture
def deployments() -> Iterator[list[Deployment]]:
    started: list[Deployment] = []
    yield started
    for deployment in started:
        deployment.stop()


def begin(slurm: SlurmSession, folder: Path, small_model_dir: Path, started: list[Deployment]) -> Deployment:
    variables = {**settings(slurm, small_model_dir, 2, 1, CONFIG), "DYN_MPI_KV_CHECK": "on"}
    command = (str(ROOT / "scripts" / "srun_disaggregated.sh"), "--skip-check")
    one_each = {
        "NUM_PREFILL_NODES": "1",
        "NUM_PREFILL_WORKERS": "2",
        "NUM_DECODE_NODES": "1",
        "NUM_DECODE_WORKERS": "2",
    }
    started.append(Deployment(slurm, folder, command, {**variables, **one_each}))
    return started[-1]


def test_the_workers_start_after_a_check_of_all_pairs(
    slurm: SlurmSession, tmp_path: Path, small_model_dir: Path, deployments: list[Deployment]
) -> None:
    deployment = begin(slurm, tmp_path, small_model_dir, deployments)
    deployment.wait_for_text("prefill-0: 1 rank on n1")
    said = deployment.text()
    place = said.index("dynamo_mpi: rank 0 on n1: kv check: 4 pairs, slowest ")
    assert "over tcp (tcp/eth0); " in said[place:]
    assert place < said.index("services on n1")
    deployment.wait_for_text("prefill-0: ready")
    # nothing of it is left beside the workers
    assert not any("checks.kv" in " ".join(line) for line in deployment.left())
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()


def test_a_pair_that_is_cut_refuses_the_start(
    slurm: SlurmSession, tmp_path: Path, small_model_dir: Path, deployments: list[Deployment]
) -> None:
    with lossy_link(slurm, "n2", "n3", 1.0):
        deployment = begin(slurm, tmp_path, small_model_dir, deployments)
        try:
            code = deployment.wait(90)
        finally:
            said = deployment.text()
            print(said)
    assert code == 75, said
    assert "the KV check refused the deployment with exit code 75; no worker was started\n1 error" in said
    assert "decode host n3 <- prefill host n2 over tcp: not done in 4 s" in said
    assert "services on" not in said
    assert deployment.left() == []
    ended = json.loads((deployment.run_dir / "ended.json").read_text())
    assert (ended["exit_code"], "n3 <- prefill host n2" in ended["report"]) == (75, True)
