# SPDX-License-Identifier: Apache-2.0
"""The walk-throughs of the four-node deployment, typed as it stands, up to where it needs GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import commands

from .dry_runs import JOB, ROOT, STANDINS

BLOCKS = {
    "README.md": "four-nodes",
    "docs/getting-started/four-nodes.md": "llama4",
    "docs/guides/slurm-pyxis.md": "llama4",
}


@pytest.mark.parametrize("page", BLOCKS)
def test_the_llama_deployment_is_what_it_says(page: str) -> None:
    salloc, *typed = commands(page, BLOCKS[page])
    assert salloc == "salloc --nodes=4 --exclusive --gpus-per-node=4"
    *setting, dry_run, real = typed
    assert real.partition("#")[0].rstrip() == "scripts/srun_disaggregated.sh"
    environment = {**JOB, "PATH": f"{STANDINS}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = "\n".join(["set -eu", *setting, dry_run])
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    steps = {part.split(":")[0].removeprefix("# "): part for part in done.stdout.split("\n\n")}
    # with an image, the check is the first part of the services' step
    assert list(steps) == ["kv-check", "services", "prefill-0", "decode-0"]
    assert "--nodelist=n1,n2 " in steps["prefill-0"]
    assert "--nodelist=n3,n4 " in steps["decode-0"]
    for role in ("prefill", "decode"):
        config = f"/mnt/engine_configs/multimodal/llama4/{role}.yaml"
        assert f"/dynamo_mpi/scripts/start_worker.sh --role {role} --engine-config {config}" in steps[f"{role}-0"]
        assert (ROOT / config.removeprefix("/mnt/")).is_file()
        assert ",MODALITY" in steps[f"{role}-0"]
    assert "MODALITY=multimodal" in steps["prefill-0"]


LAPTOP = {"README.md": "dry-run", "docs/getting-started/four-nodes.md": "dry-run"}


@pytest.mark.parametrize("page", LAPTOP)
def test_a_dry_run_needs_no_slurm(page: str, tmp_path: Path) -> None:
    for program in ("bash", "env", "dirname"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    # through a link it would not find its packages
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    (line,) = commands(page, LAPTOP[page])
    words = ["bash", "-c", line]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# not in an allocation: n1, n2 … and JOB stand for its nodes and its id\n")
    assert re.findall(r"--nodelist=(\S+)", done.stdout) == ["n1", "n1,n2,n3,n4", "n1", "n1,n2", "n3,n4"]
    assert "meta-llama/Llama-4-Maverick-17B-128E-Instruct" in done.stdout
