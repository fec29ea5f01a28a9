# SPDX-License-Identifier: Apache-2.0
"""The stand-in TensorRT-LLM: it refuses what it hasn't got, and the unmodified dynamo.trtllm serves over it.

Another Dynamo can be laid over the installed one by PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynamo_mpi.common.subprocess import session_members
from tests.conftest import ROOT, find_mpirun, mpi_environment, run_command
from tests.dynamo.running import EtcdServer, eventually, running_frontend

pytestmark = pytest.mark.dynamo
PROGRAMS = Path(__file__).parent / "programs"
REFUSALS = {
    "unknown name": "AttributeError: module 'tensorrt_llm' has no attribute 'BuildConfig'",
    "unknown torch": "AttributeError: module 'torch' has no attribute 'zeros'",
    "unknown argument": "tensor_paralel_size",
    "unknown nested": "kv_cache_config.free_gpu_memory",
    "no gpus_per_node": "gpus_per_node",
    "beams": "NotImplementedError: the stand-in has no max_beam_width",
    "attention dp": "NotImplementedError: the stand-in has no enable_attention_dp",
    "encoder": "NotImplementedError: the stand-in has no multimodal encoder",
    "no launcher": "RuntimeError: the real one would call MPI_Comm_spawn for 2 workers",
    "logprobs": "NotImplementedError: the stand-in has no logprobs",
    "two answers": "NotImplementedError: the stand-in has no n",
    "a penalty": "NotImplementedError: the stand-in has no presence_penalty",
    "prefill": "NotImplementedError: the stand-in is loaded for role agg",
    "an image": 'RequestError: the stand-in sees no images; it was given {"prompt_token_ids": [1, 2], "image": ["RGB 3x2 ',
    "a video": "NotImplementedError: the stand-in has no multimodal data but images: video",
    "a prompt in words": "NotImplementedError: the stand-in has no prompts with prompt",
    "request type": "ValueError: Unknown request type: other",
    "too long": "RequestError: The prompt length (5000) should not exceed",
    "served": "2 length",
}


def standin_environment(**variables: str) -> dict[str, str]:
    """Return an environment in which ``import tensorrt_llm`` finds the stand-in."""
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    return mpi_environment({"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables})


class LaunchedLlm:
    """``mpirun -n 2`` of the launcher, whose child is ``python -m dynamo.trtllm``, with two pipeline stages."""

    def __init__(self, folder: Path, etcd: EtcdServer, model: Path, **variables: str) -> None:
        self.log, self._pid_file = folder / "launcher.log", folder / "child.pid"
        flags = [
            "--pipeline-parallel-size",
            "2",
            "--gpus-per-node",
            "2",
            "--max-seq-len",
            "512",
            "--max-batch-size",
            "2",
        ]
        child = [
            sys.executable,
            "-m",
            "dynamo.trtllm",
            "--model",
            str(model),
            "--served-model-name",
            model.name,
            *flags,
        ]
        launcher = [sys.executable, str(PROGRAMS / "standin_launcher.py"), str(self._pid_file)]
        dynamo = {"ETCD_ENDPOINTS": etcd.url, "DYN_LOG": "warn", "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2"}
        environment = standin_environment(**dynamo | variables)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [find_mpirun(), "-n", "2", *launcher, *child],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """Return what all of them have printed."""
        return self.log.read_text(errors="replace")

    def terminate_child(self) -> None:
        """Send SIGTERM to the process that holds the LLM."""
        os.kill(int(self._pid_file.read_text()), signal.SIGTERM)

    def stop(self) -> None:
        """Kill what is left."""
        for pid in session_members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def ask_if_routed(port: int, model: str, question: str) -> dict[str, Any] | None:
    """Ask; None while the frontend lists the model, and doesn't route to it yet."""
    try:
        return ask(port, model, question)
    except urllib.error.HTTPError as error:
        assert error.code == 404, error.read()
        return None


def ask(port: int, model: str, question: str) -> dict[str, Any]:
    """Return the first choice of a chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        choice: dict[str, Any] = json.loads(reply.read())["choices"][0]
    return choice


def golden_answer(model_dir: Path) -> tuple[str, str]:
    """Return the first recorded question, and what the model says to it up to the end of its turn."""
    recorded = json.loads((ROOT / "tests/data/golden_tokens.json").read_text())["prompts"][0]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = recorded["token_ids"]
    return recorded["messages"][0]["content"], tokenizer.decode(tokens[: tokens.index(2)])


def test_what_it_has_not_got_is_refused(model_dir: Path) -> None:
    command = [sys.executable, str(PROGRAMS / "standin_refusals.py"), str(model_dir)]
    done = run_command(command, env=standin_environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: found[name] for name, text in REFUSALS.items() if text not in found[name]} == {}
    assert set(found) == set(REFUSALS)


@pytest.mark.full
@pytest.mark.parametrize("version", ["1.3.0rc22", "1.4.0rc0"])
def test_dynamo_serves_over_two_ranks_and_drains(
    tmp_path: Path, etcd: EtcdServer, model_dir: Path, version: str
) -> None:
    question, answer = golden_answer(model_dir)
    launched = LaunchedLlm(tmp_path, etcd, model_dir, STANDIN_TRTLLM_VERSION=version)
    try:
        with running_frontend(tmp_path, etcd) as frontend:
            eventually(
                lambda: launched.process.poll() is not None or model_dir.name in frontend.models(), "it is listed"
            )
            assert launched.process.poll() is None, launched.text()
            choice = eventually(lambda: ask_if_routed(frontend.port, model_dir.name, question), "it is routed to", 10)
            assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
            launched.terminate_child()
            began = time.monotonic()
            assert launched.process.wait(30) == 0, launched.text()
            assert time.monotonic() - began < 15
        assert f"standin tensorrt_llm {version}: tp 1 x pp 2 x cp 1 = 2 ranks, gpus_per_node 2" in launched.text()
        assert etcd.keys() == []
    finally:
        launched.stop()
