# SPDX-License-Identifier: Apache-2.0
"""What the preflight says of GPUs as a real Slurm hands them out. The GPUs themselves are a stand-in's, unlike ones on each node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.common.errors import ExitCode
from tests.conftest import ROOT
from tests.unit.models import SMOLLM2

from .session import Argument, SlurmSession
from .stack import WORKER
from .test_mislaunch import TWO_BY_TWO, assert_refused, library, private_files

pytestmark = pytest.mark.slurm

MIB = 2**20
TRTLLM = ("--engine", "trtllm", "--trtllm-version", "1.2.1", "--pipeline-parallel-size", "4", "--preflight-only")
H100, B200 = ("NVIDIA H100 80GB HBM3", [9, 0], 81559 * MIB), ("NVIDIA B200", [10, 0], 183359 * MIB)


def node(name: str, kind: tuple[str, Sequence[int], int] = H100, count: int = 4) -> str:
    """Describe a node's GPUs for the stand-in of nvidia-ml-py."""
    product, sm, size = kind
    gpus: list[dict[str, Any]] = [
        {
            "uuid": f"GPU-{name}-{number}",
            "name": product,
            "sm": sm,
            "total": size,
            "free": size,
            "used": 0,
            "processes": [],
            "mig": 0,
        }
        for number in range(count)
    ]
    return json.dumps({"driver": "570.86.15", "cuda": 12080, "gpus": gpus})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, beside the metadata of a TensorRT-LLM."""
    folder = tmp_path_factory.mktemp("gpus")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SMOLLM2))
    (folder / "tensorrt_llm-1.2.1.dist-info").mkdir()
    (folder / "tensorrt_llm-1.2.1.dist-info" / "METADATA").write_text("Name: tensorrt_llm\nVersion: 1.2.1\n")
    return folder


class Case(NamedTuple):
    """Two nodes with two ranks each.

    Attributes:
        options: how srun hands out GPUs.
        second: the second node's GPUs.
        code: the exit code.
        words: patterns, each of which is said once.
    """

    options: tuple[str, ...]
    second: str
    code: ExitCode
    words: tuple[str, ...]


CASES = {
    "as many as ranks": Case(
        ("--gpus-per-node=2",), node("n2"), ExitCode.OK, (r"preflight: ok: .* 4 ranks on 2 nodes \(n1 … n2\), h100",)
    ),
    "one for each task": Case(
        ("--gpus-per-task=1", "--gpu-bind=single:1"),
        node("n2"),
        ExitCode.USAGE,
        (
            r"error K9: each rank sees one GPU only, and not the same: ranks 0-1 on n1 and 2-3 on n2\n",
            "--gpus-per-node=2",
        ),
    ),
    "fewer than ranks": Case(
        ("--gpus-per-node=1",), node("n2"), ExitCode.USAGE, (r"error K9: 2 ranks would share 1 GPU",)
    ),
    "none": Case((), node("n2", count=0), ExitCode.USAGE, ("error V1: .* ranks 2-3 on n2\n",)),
    "another kind on one node": Case(
        ("--gpus-per-node=2",), node("n2", B200), ExitCode.USAGE, ("error G6: the GPUs are of different architectures",)
    ),
    "a node that has lost some": Case(
        ("--gpus-per-node=4",), node("n2", count=3), ExitCode.USAGE, ("4 GPUs on n1; 3 GPUs on n2",)
    ),
}


@pytest.mark.landing("fewer than ranks")
@pytest.mark.parametrize("name", CASES)
def test_gpus_as_slurm_hands_them_out(slurm: SlurmSession, folder: Path, name: str) -> None:
    case = CASES[name]
    with private_files(slurm, "node.json", {"n1": node("n1"), "n2": case.second}) as path:
        environment = {
            **library(slurm, "debian"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'standins'}:{folder}",
            "PYNVML_STANDIN": str(path),
            "OMP_NUM_THREADS": "1",
        }
        command: tuple[Argument, ...] = (
            "--mpi=pmix",
            *TWO_BY_TWO,
            *case.options,
            *WORKER,
            "--model",
            folder / "model",
            *TRTLLM,
        )
        done = slurm.srun(*command, env=environment)
    assert_refused(done, case.code, case.words)
