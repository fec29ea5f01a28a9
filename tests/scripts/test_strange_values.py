# SPDX-License-Identifier: Apache-2.0
"""Paths and values with blanks, quotes and what a shell would run: they arrive as they are, and nothing is run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .dry_runs import ROOT, STANDINS

STRANGE = [
    "with blank",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a&b|c>d",
    "*",
    "-n",
    "ünï",
    "back\\slash",
]


def launch(checkout: Path, folder: Path, words: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run the script of a checkout in ``folder`` up to its first srun; return what that got."""
    record = folder / "record.json"
    variables = {
        "PATH": f"{STANDINS}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "STANDIN_RECORD": str(record),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "NUM_PREFILL_NODES": "2",
        "NUM_DECODE_NODES": "2",
        **environment,
    }
    command = [str(checkout / "scripts" / "srun_disaggregated.sh"), *words]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 78, done.stderr
    assert "the stand-in for srun refuses" in done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.landing('say "hi"', "$(touch pwned)")
@pytest.mark.parametrize("value", STRANGE)
def test_values_arrive_as_they_are(value: str, tmp_path: Path) -> None:
    variables = dict.fromkeys(("MODEL_PATH", "SERVED_MODEL_NAME", "PREFILL_ENGINE_CONFIG", "IMAGE"), value)
    (step,) = launch(ROOT, tmp_path, [], {**variables, "DECODE_ENGINE_CONFIG": "d.yaml"})
    words = step["words"]
    assert f"--container-image={value}" in words
    check = shlex.split(words[words.index("--check") + 1])
    assert check[check.index("--prefill-engine-config") + 1] == value
    assert (step["environment"]["MODEL_PATH"], step["environment"]["SERVED_MODEL_NAME"]) == (value, value)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.landing("with blank", "$(touch pwned)")
@pytest.mark.parametrize("value", [value for value in STRANGE if "/" not in value])
def test_a_checkout_and_a_run_folder_may_be_called_anything(value: str, tmp_path: Path) -> None:
    checkout, folder = tmp_path / value / "checkout", tmp_path / "work"
    folder.mkdir()
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    shutil.copytree(ROOT / "dynamo_mpi", checkout / "dynamo_mpi", ignore=shutil.ignore_patterns("__pycache__"))
    (step,) = launch(checkout, folder, ["--run-dir", f"run {value}"], {"MODEL_PATH": "/m"})
    assert f"{checkout}/scripts/dynamo-mpi.sh" in step["words"]
    assert f"{checkout}/engine_configs/multimodal/llama4/prefill.yaml" in step["words"]
    run_dir = folder / f"run {value}"
    assert (run_dir.stat().st_mode & 0o777, sorted(path.name for path in run_dir.iterdir())) == (
        0o700,
        ["ended.json", "lock", "logs", "ready", "timeline"],
    )
    assert not list(tmp_path.rglob("pwned"))


def test_what_salloc_left_for_srun_is_not_handed_on(tmp_path: Path) -> None:
    (step,) = launch(ROOT, tmp_path, [], {"MODEL_PATH": "/m", "SLURM_NTASKS": "16", "SLURM_GPUS_PER_TASK": "1"})
    assert not {"SLURM_NTASKS", "SLURM_GPUS_PER_TASK"} & step["environment"].keys()
    assert step["environment"]["SLURM_JOB_ID"] == "1234"


def test_nodes_of_the_allocation_are_taken_by_name(tmp_path: Path) -> None:
    variables = {"MODEL_PATH": "/m", "NUM_PREFILL_NODES": "1", "NUM_DECODE_NODES": "1"}
    (step,) = launch(ROOT, tmp_path, ["--nodes", "n[3-4]"], variables)
    assert "--nodelist=n3" in step["words"]
