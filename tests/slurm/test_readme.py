# SPDX-License-Identifier: Apache-2.0
"""The walk-through of four nodes without GPUs, typed as it stands on a real Slurm, and its answer."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import commands

from .deployment import Deployment
from .session import SlurmSession
from .test_deployment import answer

pytestmark = pytest.mark.slurm


@pytest.mark.full
def test_the_deployment_of_the_first_pages(slurm: SlurmSession, tmp_path: Path) -> None:
    export, salloc, *typed = commands("docs/getting-started/four-nodes.md", "reference")
    assert salloc == "salloc --nodes=4 --exclusive"
    # the reader stands in a checkout; this one stays as it is
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("scripts", "dynamo_mpi", "engine_configs"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / ".venv").symlink_to(Path(sys.executable).parents[1])
    subprocess.run(shlex.split(export), cwd=checkout, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)

    environment = {**slurm.debian_openmpi_env, "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}
    script = ["bash", "-c", "\n".join([f"cd {shlex.quote(str(checkout))}", *typed[:-1], f"exec {typed[-1]}"])]
    deployment = Deployment(slurm, tmp_path, script, environment)
    try:
        deployment.wait_for_text("ready: smollm2. Try:")
        assert "prefill-0: 6 ranks on n1,n2" in deployment.text()
        assert "decode-0: 6 ranks on n3,n4" in deployment.text()
        assert answer(deployment) == "The capital of France is Paris."
        os.kill(deployment.launcher(), signal.SIGINT)
        assert deployment.wait() == 130, deployment.text()
    finally:
        deployment.stop()
