# SPDX-License-Identifier: Apache-2.0
"""A TensorRT-LLM worker on a real Slurm, over two nodes: the unmodified ``dynamo.trtllm`` over the stand-in engine."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually

from .stack import SlurmWorker, Stack, answer_of

pytestmark = pytest.mark.slurm
Start = Callable[..., SlurmWorker]
CONFIG = "tensor_parallel_size: 3\npipeline_parallel_size: 2\nmax_seq_len: 512\nmax_batch_size: 2\n"
PATHS = filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)])
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(PATHS),
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
    # the nodes share this machine's cores and don't know
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def start(stack: Stack, tmp_path: Path, model_dir: Path) -> Iterator[Start]:
    """Start a worker of six ranks on two nodes, by the one line that users have, and end whatever is left of it."""
    workers: list[SlurmWorker] = []

    def begin(*flags: str, **environment: str) -> SlurmWorker:
        config = tmp_path / "engine.yaml"
        config.write_text(CONFIG)
        variables = {**stack.environment, **stack.slurm.debian_openmpi_env, **ENVIRONMENT, **environment}
        # as the Slurm example of Dynamo has them
        variables |= {"MODEL_PATH": str(model_dir), "ENGINE_CONFIG": str(config), "SERVED_MODEL_NAME": "smollm2"}
        nodes = ",".join(stack.slurm.nodes[:2])
        srun = ("--mpi=pmix", "--nodes=2", f"--nodelist={nodes}", "--ntasks-per-node=3")
        words = ("--engine", "trtllm", "--allow-no-gpu", *flags)
        workers.append(SlurmWorker(stack.slurm, tmp_path, srun, words, variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def test_answers_over_two_nodes_and_drains_on_sigterm(start: Start, stack: Stack) -> None:
    worker = start()
    ready = worker.ready()
    assert (ready["ranks"], ready["host"], ready["model"]) == (6, "n1", "smollm2")
    assert "gpus_per_node 3" in worker.text()
    with stack.ask("smollm2", "What is the capital of France?", 12) as asking:
        assert "The capital of France is Paris" in answer_of(asking)["text"]
    # to every rank, and to what they have started
    assert stack.slurm.exec("scancel", "--signal=TERM", f"{worker.job}.0").returncode == 0
    eventually(lambda: stack.keys() == [], "the keys are gone", 10)
    assert worker.wait() == 0, worker.text()
    assert worker.ranks() == {}


@pytest.mark.full
def test_a_rank_of_the_other_node_that_raises_is_reported_with_its_host(start: Start) -> None:
    worker = start(STANDIN_TRTLLM_FAULT="raise:4")
    assert worker.wait() == 70, worker.text()
    (report,) = re.findall(r"dynamo_mpi: [^\n]*: error[^\n]*", worker.text())
    assert "rank 0 on n1: error in load: rank 4 on n2: Traceback" in report
    assert worker.ranks() == {}


@pytest.mark.full
def test_a_child_that_is_killed_ends_the_step(start: Start) -> None:
    worker = start()
    worker.ready()
    ((node, (child,)),) = worker.processes(
        (sys.executable, "-m", "dynamo_mpi.common.run_with_services", "dynamo.trtllm")
    ).items()
    assert node == "n1"
    os.kill(child, signal.SIGKILL)
    assert worker.wait() == 137, worker.text()
    assert re.search(r"error in serve: dynamo\.trtllm was ended by signal 9", worker.text())
    assert worker.ranks() == {}
