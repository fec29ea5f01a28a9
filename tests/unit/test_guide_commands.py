# SPDX-License-Identifier: Apache-2.0
"""What readers type from the guides, as it stands, as far as it needs no cluster; and the output that they show."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode
from tests.conftest import ROOT
from tests.monitoring import program
from tests.pages import block_of, run_lines
from tests.unit.model_zoo import ZOO

PREFLIGHT = "docs/guides/preflight.md"
MODELS = {
    "DeepSeek-R1": "DeepSeek-R1",
    "Llama-4-Maverick": "Llama-4-Maverick-17B-128E",
    "M": "Llama-3.1-70B",
}
TRANSFER = "cache_transceiver_config:\n  backend: UCX\n"
RECIPES = {
    "tp8.yaml": f"tensor_parallel_size: 8\n{TRANSFER}",
    "p.yaml": f"tensor_parallel_size: 8\ndisable_overlap_scheduler: true\n{TRANSFER}",
    "d.yaml": f"tensor_parallel_size: 16\n{TRANSFER}",
    "decode.yaml": f"tensor_parallel_size: 16\nenable_attention_dp: true\nmoe_expert_parallel_size: 16\n{TRANSFER}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models and recipes that the page names, and `dynamo-mpi` on PATH."""
    for name, known in MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(ZOO[known]))
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "dynamo-mpi"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dynamo_mpi "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), **variables}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def link_checkout(folder: Path) -> None:
    for name in ("scripts", "engine_configs"):
        (folder / name).symlink_to(ROOT / name)


def test_check_says_what_the_page_shows(folder: Path) -> None:
    block = block_of(PREFLIGHT, "check")
    done = [run(line, folder) for line in block.commands]
    assert [one.returncode for one in done] == [ExitCode.ILLEGAL_LAYOUT, 0, 0], [
        one.stdout + one.stderr for one in done
    ]
    for line in block.output:
        assert line in done[0].stdout.splitlines(), line


def test_plan_says_what_the_page_shows(folder: Path) -> None:
    block = block_of(PREFLIGHT, "plan")
    (line,) = block.commands
    done = run(line, folder)
    assert done.returncode == 0, done.stderr
    for line in block.output:
        assert line in done.stdout.splitlines(), line


def test_the_library_s_example_runs(folder: Path) -> None:
    done = run(f"python - <<'END'\n{chr(10).join(block_of(PREFLIGHT, 'library').lines)}\nEND", folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_is_written(folder: Path) -> None:
    pytest.importorskip("shtab")
    (line,) = run_lines("docs/guides/operating.md", "completion")
    target = folder / ".local/share/bash-completion/completions"
    target.mkdir(parents=True)
    done = run(line, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dynamo-mpi" in (target / "dynamo-mpi").read_text()


def test_a_dry_run_over_a_hostfile(folder: Path) -> None:
    link_checkout(folder)
    (folder / "hosts").write_text("n1\nn2\nn3\nn4\n")
    (line,) = run_lines("docs/guides/mpirun.md", "hostfile")
    done = run(line, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "    --host n3:4,n4:4 \\\n" in done.stdout


@pytest.mark.parametrize("page", ["docs/guides/slurm.md", "docs/guides/slurm-pyxis.md"])
def test_a_dry_run_of_a_batch_job(page: str, folder: Path) -> None:
    link_checkout(folder)
    (line,) = run_lines(page, "sbatch")
    done = run(line, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sbatch --nodes=4 --gpus-per-node=4 --time=04:00:00 " in done.stdout


def test_a_dry_run_without_containers(folder: Path) -> None:
    link_checkout(folder)
    (folder / "python").symlink_to(sys.executable)
    salloc, *typed, real = run_lines("docs/guides/slurm.md", "deployment")
    assert (salloc, real) == ("salloc --nodes=4 --exclusive", "scripts/srun_disaggregated.sh")
    script = "\n".join(["set -e", *typed]).replace("/shared/dynamo-mpi/bin/python", sys.executable)
    done = run(script, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("--ntasks-per-node=3") == 2


@pytest.mark.full
def test_the_rules_of_monitoring_are_checked_as_the_page_says() -> None:
    promtool = program("promtool")
    (line,) = run_lines("docs/guides/monitoring.md", "promtool")
    done = run(line, ROOT, PATH=f"{Path(promtool).parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
