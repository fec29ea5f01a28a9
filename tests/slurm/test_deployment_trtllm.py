# SPDX-License-Identifier: Apache-2.0
"""A whole deployment of TensorRT-LLM workers by the script, on a real Slurm: the unmodified ``dynamo.trtllm`` over the stand-in engine."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.dynamo.running import eventually
from tests.dynamo.test_images_trtllm import described, png
from tests.namespaces.processes import command_line

from .deployment import READY_SECONDS, Deployment
from .session import SlurmSession
from .test_deployment import IMAGE_QUESTION, answer, settings

pytestmark = pytest.mark.slurm
CONFIG = """\
tensor_parallel_size: 3
pipeline_parallel_size: 2
max_seq_len: 512
max_batch_size: 2
cache_transceiver_config: {backend: UCX}
disable_overlap_scheduler: true
"""
RANKS, KERNELS = 6, 2


def data_url(colour: str) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def with_image(url: str) -> dict[str, Any]:
    """Return the example's request for another image."""
    content = [{"type": "text", "text": "Describe the image"}, {"type": "image_url", "image_url": {"url": url}}]
    return {**IMAGE_QUESTION, "messages": [{"role": "user", "content": content}]}


@pytest.fixture
def deployment(slurm: SlurmSession, tmp_path: Path, model_dir: Path) -> Iterator[Deployment]:
    """A prefill and a decode worker of six ranks on two nodes each, as the script starts them; whatever is left of them is ended."""
    (tmp_path / "engine.yaml").write_text(CONFIG)
    (tmp_path / "caches").mkdir()
    variables = {
        **settings(slurm, model_dir, 2, 3, "/configs/engine.yaml"),
        "PYTHONPATH": "/mnt/tests/standins",
        "DYN_MPI_ENGINE": "auto",
        "MODALITY": "multimodal",
        "DYN_LOG": "warn",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
        "CACHE_DIR": str(tmp_path / "caches"),
        "STANDIN_TRTLLM_KERNELS": str(KERNELS),
    }
    variables["MOUNTS"] += f",{tmp_path}:/configs"
    script = str(ROOT / "scripts" / "srun_disaggregated.sh")
    started = Deployment(slurm, tmp_path, (script, "--max-restarts", "1", "--", "--allow-no-gpu"), variables)
    yield started
    started.stop()


@pytest.mark.full
def test_a_pair_answers_is_seeded_when_started_again_and_ends_with_the_launcher(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.wait_for_text("ready: smollm2. Try:")
    assert deployment.steps() == {"services": "n1", "prefill-0": "n[1-2]", "decode-0": "n[3-4]"}
    for name, node in (("prefill", "n1"), ("decode", "n3")):
        (child,) = deployment.pids_of(node, "dynamo.trtllm")
        words = command_line(child)
        assert words[words.index("--disaggregation-mode") + 1] == name
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        assert {"CUDA_VISIBLE_DEVICES=0,1,2,3", "DYN_TRTLLM_MODALITY=multimodal"} <= set(variables)
        log = (deployment.run_dir / "logs" / f"{name}-0.log").read_text()
        assert "standin tensorrt_llm 1.3.0rc22: tp 3 x pp 2 x cp 1 = 6 ranks, gpus_per_node 3" in log
    assert answer(deployment) == "The capital of France is Paris."
    # the image's address has come to dynamo.trtllm, which wants leave to ask for it
    status, body = deployment.post(IMAGE_QUESTION)
    assert (status, "set DYN_MM_ALLOW_INTERNAL=1" in body) == (400, True), body
    # an image that needs no leave comes to the prefill worker's engine, which sees none; decode is not asked
    status, body = deployment.post(with_image(data_url("red")))
    assert status == 500, body
    logs = deployment.run_dir / "logs"
    eventually(lambda: described("red") in (logs / "prefill-0.log").read_text(), "the refusal is in the log", 10)
    assert answer(deployment) == "The capital of France is Paris."
    assert described("red") not in (logs / "decode-0.log").read_text()
    check_caches(deployment, tmp_path / "caches")
    assert answer(deployment) == "The capital of France is Paris."

    drained = deployment.text().count("drain: dynamo.trtllm deregisters")
    os.kill(deployment.launcher(), signal.SIGINT)
    assert deployment.wait() == 130, deployment.text()
    assert deployment.text().count("drain: dynamo.trtllm deregisters") == drained + 2, deployment.text()
    deployment.assert_ended_in_order("failures")


def check_caches(deployment: Deployment, folder: Path) -> None:
    """Check that both workers have compiled and written an archive, and that decode, killed and started again, compiles nothing."""
    cold = [(rank, 0, KERNELS, "tuned") for rank in range(RANKS)]
    # each kernel is two files, and there is one of tactics
    written = f"caches: {RANKS * (2 * KERNELS + 1)} new files; written back to {folder}/dynamo-mpi-{os.geteuid()}/"
    eventually(lambda: deployment.text().count(written) == 2, "both archives are written", 60)
    for role in ("prefill", "decode"):
        assert kernels(deployment, role) == cold
    # one for each role
    archives = sorted((folder / f"dynamo-mpi-{os.geteuid()}").iterdir())
    assert [len(list(archive.glob("*.tar"))) for archive in archives] == [RANKS, RANKS]
    os.kill(deployment.pids_of("n4", "dynamo_mpi.worker")[-1], signal.SIGKILL)
    eventually(lambda: deployment.text().count("decode-0: ready") == 2, "it is ready again", READY_SECONDS)
    assert "caches: seeded from " in log_of(deployment, "decode")
    assert kernels(deployment, "decode")[-RANKS:] == [(rank, KERNELS, 0, "tactics loaded") for rank in range(RANKS)]


def log_of(deployment: Deployment, role: str) -> str:
    return (deployment.run_dir / "logs" / f"{role}-0.log").read_text(errors="replace")


def kernels(deployment: Deployment, role: str) -> list[tuple[int, int, int, str]]:
    """Return of each rank: its number, the kernels that it loaded and made, what it did about tactics; by start."""
    words = r"stand-in kernels: rank (\d+) loaded (\d+), made (\d+), ([a-z ]+), in"
    found = re.findall(words, log_of(deployment, role))
    starts = [found[begin : begin + RANKS] for begin in range(0, len(found), RANKS)]
    return [(int(r), int(loaded), int(made), t) for start in starts for r, loaded, made, t in sorted(start)]
