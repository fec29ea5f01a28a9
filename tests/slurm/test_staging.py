# SPDX-License-Identifier: Apache-2.0
"""A model copied to nodes ahead of a job, by a step of the real Slurm; whole deployments: `test_deployment`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .session import SlurmSession
from .slow_folder import slow_folder
from .stack import OUR_MODULES

pytestmark = pytest.mark.slurm
VERB = (sys.executable, "-m", "dynamo_mpi", "stage")
LOCAL = "/dev/shm/ahead"


def test_the_verb_copies_a_model_to_nodes_and_one_that_has_it_feeds_the_others(
    slurm: SlurmSession, tmp_path: Path
) -> None:
    model, mounted = tmp_path / "model", tmp_path / "mounted"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "model.safetensors").write_bytes(os.urandom(48 << 20))
    environment = {**OUR_MODULES, **slurm.debian_openmpi_env}

    def stage(nodes: str) -> subprocess.CompletedProcess[str]:
        # its nodes are not the job's first ones
        allocation = ("salloc", "--nodes=4", "--exclusive", "--ntasks-per-node=2")
        return slurm.exec(*allocation, *VERB, mounted, "--stage", LOCAL, "--nodes", nodes, env=environment)

    with slow_folder(slurm, model, mounted) as share:
        first = stage("n[2-3]")
        assert first.returncode == 0, first.stderr
        assert "stage: 2 nodes have the model (0.0 GiB) in /dev/shm/ahead/dynamo-mpi-" in first.stderr
        assert (48 << 20) <= share.reset() <= 1.05 * (48 << 20)
        more = stage("n[2-4]")
        assert more.returncode == 0, more.stderr
        assert "stage: 3 nodes have the model (0.0 GiB) in " in more.stderr
        assert share.reset() < 1 << 20
        listed = [
            json.loads(slurm.exec(*VERB, "--stage", LOCAL, "--output", "json", env=OUR_MODULES, host=node).stdout)
            for node in slurm.nodes[1:4]
        ]
        names = {tuple(copy["name"] for copy in each["copies"]) for each in listed}
        assert len(names) == 1
        for each in listed:
            (copy,) = each["copies"]
            assert (copy["complete"], copy["in_use"], copy["source"]) == (True, False, str(mounted))
    for node in slurm.nodes[1:4]:
        removed = slurm.exec(*VERB, "--stage", LOCAL, "--unstage", "all", env=OUR_MODULES, host=node)
        assert removed.returncode == 0, removed.stderr
