# SPDX-License-Identifier: Apache-2.0
"""examples/: each one runs, and does what its header says."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from tests.conftest import ROOT
from tests.servers import closed_port
from tests.unit.board import Board

EXAMPLES = ROOT / "examples"
SRUN = "srun --mpi=pmix --nodes=2 --ntasks-per-node=3 --distribution=block --kill-on-bad-exit=1 --label --unbuffered"
LAUNCHERS = {
    "worker_under_srun.sh": ({}, SRUN, 6),
    "worker_under_mpirun.sh": ({}, "mpirun -n 3", 3),
    "worker_under_mpirun.sh on hosts": (
        {"HOSTS": "n1 n2", "ENGINE_CONFIG": f"{ROOT}/engine_configs/smollm2/tp3_pp2.yaml"},
        "mpirun --host n1:3,n2:3 --map-by ppr:3:node -n 6 -x ETCD_ENDPOINTS",
        6,
    ),
}


def run_example(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = EXAMPLES / name
    command = ["bash", str(path)] if path.suffix == ".sh" else [sys.executable, str(path)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([*command, *words], env=environment, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("case", LAUNCHERS)
def test_the_command_line_is_the_documented_one(case: str) -> None:
    variables, launcher, ranks = LAUNCHERS[case]
    done = run_example(case.split()[0], "--dry-run", "--preflight-only", MODEL_PATH="a model", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    started, _, worker = done.stdout.partition(" python3 -m dynamo_mpi.worker ")
    assert shlex.split(started) == launcher.split()
    settings = load_settings(WorkerSources(shlex.split(worker), {}))
    assert (settings.engine, settings.model, settings.preflight_only) == ("reference", Path("a model"), True)
    assert settings.engine_config is not None
    sizes = dict(
        line.split(": ") for line in settings.engine_config.read_text().splitlines() if "parallel_size" in line
    )
    assert int(sizes["tensor_parallel_size"]) * int(sizes.get("pipeline_parallel_size", 1)) == ranks


@pytest.mark.parametrize("name", ["check_recipes.py", "own_layout_rule.py"])
def test_without_arguments_its_usage_is_shown(name: str) -> None:
    done = run_example(name)
    assert (done.returncode, done.stdout, f"python examples/{name} MODEL" in done.stderr) == (64, "", True)


@pytest.mark.parametrize("name", ["worker_under_srun.sh", "worker_under_mpirun.sh"])
def test_what_runs_is_what_the_dry_run_prints(name: str, tmp_path: Path) -> None:
    launcher = name.removeprefix("worker_under_").removesuffix(".sh")
    standin = tmp_path / launcher
    standin.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 78\n', encoding="utf-8")
    standin.chmod(0o755)
    variables = {"MODEL_PATH": "a model", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = shlex.split(run_example(name, "--dry-run", "--role", "agg", **variables).stdout)
    done = run_example(name, "--role", "agg", **variables)
    assert (done.returncode, done.stdout.splitlines()) == (78, words[1:])


@pytest.mark.parametrize("name", ["worker_under_srun.sh", "worker_under_mpirun.sh"])
def test_a_missing_model_is_named(name: str) -> None:
    done = run_example(name, "--dry-run")
    assert done.returncode != 0
    assert "MODEL_PATH" in done.stderr


@pytest.mark.parametrize(
    ("config", "nodes", "gpus", "code", "errors"),
    [
        ("prefill_tp8_1x8.yaml", "1", "8", ExitCode.OK, []),
        ("prefill.yaml", "2", "4", ExitCode.ILLEGAL_LAYOUT, ["X1"]),
        # 16 ranks for tp 8
        ("prefill_tp8_1x8.yaml", "2", "8", ExitCode.ILLEGAL_LAYOUT, ["A1"]),
    ],
)
def test_own_rule_is_applied_with_the_others(
    config: str, nodes: str, gpus: str, code: ExitCode, errors: list[str]
) -> None:
    model = str(ROOT / "tests" / "data" / "model_configs" / "Llama-4-Maverick-17B-128E-Instruct.json")
    done = run_example(
        "own_layout_rule.py", model, str(ROOT / "engine_configs" / "multimodal" / "llama4" / config), nodes, gpus
    )
    assert (done.returncode, done.stderr) == (code, "")
    lines = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert [line.split()[1].rstrip(":") for line in lines] == errors


def test_worker_records_of_a_namespace_are_listed(clean_board: Board) -> None:
    clean_board.worker("prefill", phase="load")
    clean_board.worker("agg", lease="b", namespace="other")
    clean_board.put("worlds/dynamo/backend/c", b"no JSON")
    done = run_example("read_worker_records.py", "dynamo", ETCD_ENDPOINTS=clean_board.url)
    assert done.returncode == 0
    assert done.stdout == "M: prefill worker on prefill1, prefill2 (job 12.0), TP8, phase load, instance None\n"
    assert done.stderr == "dynamo_mpi/v1/worlds/dynamo/backend/c can't be read: no JSON\n"


def test_etcd_that_does_not_answer_is_an_exit_code() -> None:
    with closed_port() as port:
        done = run_example("read_worker_records.py", ETCD_ENDPOINTS=f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (ExitCode.UNAVAILABLE, "")
    assert "etcd" in done.stderr


def test_a_folder_of_recipes_is_checked_in_one_process(tmp_path: Path) -> None:
    model = str(ROOT / "tests" / "data" / "model_configs" / "Llama-4-Maverick-17B-128E-Instruct.json")
    recipes = {
        "ok": "tensor_parallel_size: 8\n",
        "two_nodes": "tensor_parallel_size: 8\npipeline_parallel_size: 2\ngpus_per_node: 8\n",
        "heads": "tensor_parallel_size: 7\n",
        "key": "tensor_parallel_size: 8\nmax_batch_sise: 4\n",
        "no_yaml": "[",
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    done = run_example("check_recipes.py", model, str(tmp_path), "8", "h200")
    found = dict(line.split(".yaml: ", 1) for line in done.stdout.splitlines())
    assert {Path(name).name: said for name, said in found.items()} == {
        "ok": "ok",
        "two_nodes": "ok",
        "heads": "B1: 40 attention heads can't be divided over tp_size = 7",
        "key": "H: `max_batch_sise` is not a key of TensorRT-LLM's YAML",
        "no_yaml": found[str(tmp_path / "no_yaml")],
    }
    assert "is not YAML" in found[str(tmp_path / "no_yaml")]
    assert (done.returncode, done.stderr) == (ExitCode.ILLEGAL_LAYOUT, "")
    (tmp_path / "heads.yaml").unlink()
    assert run_example("check_recipes.py", model, str(tmp_path), "8").returncode == ExitCode.DATA
    done = run_example("check_recipes.py", "/nowhere", str(tmp_path), "8")
    assert (done.returncode, done.stdout) == (ExitCode.NO_MODEL, "")


def test_a_folder_without_recipes_is_no_success(tmp_path: Path) -> None:
    model = str(ROOT / "tests" / "data" / "model_configs" / "Meta-Llama-3.1-8B.json")
    for folder in (tmp_path, tmp_path / "mistyped"):
        done = run_example("check_recipes.py", model, str(folder), "8")
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        assert "no *.yaml below" in done.stderr
