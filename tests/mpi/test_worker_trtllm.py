# SPDX-License-Identifier: Apache-2.0
"""The preflight of TensorRT-LLM's workers over real mpirun. No GPU is needed: nvidia-ml-py and the engine's metadata have stand-ins."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Mpirun, find_mpirun, mpi_environment, run_command
from tests.mpi.test_worker_refusals import Done, assert_refused, make_model

pytestmark = pytest.mark.mpi

GIB = 2**30
TRANSCEIVER = ("--trtllm.cache_transceiver_config.backend", "UCX")
TRTLLM = ("--engine", "trtllm", "--preflight-only")
# what this host would get findings for otherwise
QUIET = {"OMP_NUM_THREADS": "1", "PRTE_MCA_hwloc_default_binding_policy": "none"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment where TensorRT-LLM is installed, and NVML serves no GPU yet. Importing the engine fails."""
    folder = tmp_path / "packages"
    (folder / "tensorrt_llm").mkdir(parents=True)
    (folder / "tensorrt_llm" / "__init__.py").write_text("raise RuntimeError('tensorrt_llm was imported')\n")
    (folder / "tensorrt_llm-1.2.1.dist-info").mkdir()
    (folder / "tensorrt_llm-1.2.1.dist-info" / "METADATA").write_text("Name: tensorrt_llm\nVersion: 1.2.1\n")
    return {**QUIET, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'standins'}:{folder}"}


def node_with(folder: Path, used: Sequence[int], **more: Any) -> dict[str, str]:
    """Describe a node's GPUs by the GiB that somebody holds on each, and return the variable that names the description; ``more`` is of the
    last GPU."""
    total = 81559 * 2**20
    gpus: list[dict[str, Any]] = [
        {
            "uuid": f"GPU-{number}",
            "name": "NVIDIA H100 80GB HBM3",
            "sm": [9, 0],
            "total": total,
            "free": total - size * GIB,
            "used": size * GIB,
            "processes": [[4242, size * GIB]] if size else [],
            "mig": 0,
        }
        for number, size in enumerate(used)
    ]
    gpus[-1] |= more
    path = folder / "node.json"
    path.write_text(json.dumps({"driver": "570.86.15", "cuda": 12080, "gpus": gpus}))
    return {"PYNVML_STANDIN": str(path)}


def test_a_role_that_the_reference_engine_lacks(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--role", "encode", "--engine", "reference")
    assert_refused(done, 64, "flag --role is 'encode'", "--engine trtllm")


def test_a_role_of_a_pair_is_tensorrt_llms_also_where_that_is_missing(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", "--role", "prefill", *TRANSCEIVER, env=QUIET)
    assert_refused(done, 64, "error V1: no rank sees a GPU", "error D10: TensorRT-LLM isn't installed")


def test_a_host_without_gpus_and_without_the_engine_is_reported_both_at_once(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", *TRTLLM, env=QUIET)
    assert_refused(
        done, 64, "error V1: no rank sees a GPU", "--allow-no-gpu", "error D10: TensorRT-LLM isn't installed"
    )


def test_a_host_without_gpus(mpirun: Mpirun, model: Path, installed: dict[str, str]) -> None:
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", *TRTLLM, env=installed)
    assert_refused(done, 64, "1 error,", "error V1: no rank sees a GPU", "the NVIDIA driver isn't loaded")


def test_without_gpus_by_permission_the_engine_is_missed_alone(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", *TRTLLM, "--allow-no-gpu", env=QUIET)
    assert_refused(done, 64, "1 error,", "error D10: TensorRT-LLM isn't installed", "container")


def test_without_gpus_by_permission_the_layout_is_judged_first(mpirun: Mpirun, model: Path) -> None:
    done = mpirun.worker(2, "--model", str(model), "--tp-size", "2", *TRTLLM, "--allow-no-gpu", env=QUIET)
    assert_refused(done, 78, "error B1", "error D10")


def test_a_decode_worker_is_checked_by_its_own_config(
    mpirun: Mpirun, model: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "decode.yaml").write_text("pipeline_parallel_size: 2\ncache_transceiver_config: {backend: UCX}\n")
    environment = {**installed, "DYN_MPI_ALLOW_NO_GPU": "1", "DECODE_ENGINE_CONFIG": str(tmp_path / "decode.yaml")}
    done = mpirun.worker(2, "--model", str(model), "--role", "decode", *TRTLLM, env=environment)
    assert_refused(done, 0, "preflight: ok", "pp 2")


def test_a_healthy_node(mpirun: Mpirun, model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    environment = {**installed, **node_with(tmp_path, [0, 0, 0])}
    done = mpirun.worker(3, "--model", str(model), "--tp-size", "3", *TRTLLM, env=environment)
    assert_refused(done, 0, "preflight: ok: LlamaForCausalLM, tp 3, 3 ranks on ", ", h100")
    assert "error" not in done.stderr


def test_a_busy_gpu(mpirun: Mpirun, model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    environment = {**installed, **node_with(tmp_path, [0, 30])}
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", *TRTLLM, env=environment)
    assert_refused(done, 0, "warning V2: 1 GPU is in use by others", "rank 1 on ", "pid 4242 holds 30.0 GiB")


def test_a_gpu_outside_the_nvlink_fabric(
    mpirun: Mpirun, model: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    environment = {**installed, **node_with(tmp_path, [0, 0], fabric={"state": 2})}
    done = mpirun.worker(2, "--model", str(model), "--pp-size", "2", *TRTLLM, env=environment)
    assert_refused(
        done, 0, "warning V16: 1 GPU has not joined the NVLink fabric", "GPU 1 on ", "registration in progress"
    )


def each_with_its_own_gpu(folder: Path, environment: dict[str, str], *arguments: str) -> Done:
    script = folder / "own_gpu.sh"
    script.write_text('#!/bin/sh\nCUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    command = [find_mpirun(), "-n", "2", str(script), sys.executable, "-m", "dynamo_mpi.worker", *arguments]
    return run_command(command, env=mpi_environment(environment), timeout=60)


def test_hidden_gpus(model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    environment = {**installed, **node_with(tmp_path, [0, 0])}
    done = each_with_its_own_gpu(tmp_path, environment, "--model", str(model), "--pp-size", "2", *TRTLLM)
    assert_refused(
        done, 64, "1 error,", "error K9", "CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1", "--gpus-per-node=2"
    )


def test_a_hub_id_is_a_folder_to_the_other_ranks(mpirun: Mpirun, tmp_path: Path) -> None:
    make_model(tmp_path / "models--org--Model" / "snapshots" / "0123abc")
    words = ("--model", "org/Model", "--pp-size", "2", "--preflight-only")
    done = mpirun.worker(2, *words, env={"HF_HUB_CACHE": str(tmp_path)})
    assert_refused(done, 0, "preflight: ok")
