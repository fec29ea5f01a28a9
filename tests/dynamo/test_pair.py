# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode worker of the reference engine behind a real frontend answer as one aggregated worker does."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.deploy.services import Frontend
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, http_get, running_frontend, system_port

pytestmark = pytest.mark.dynamo

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
Start = Callable[..., RunningWorker]


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model_dir: Path) -> Iterator[Start]:
    """Start workers by role; what is left of them is killed."""
    workers: list[RunningWorker] = []

    def begin(role: str, ranks: int, *flags: str, name: str = "", **environment: str) -> RunningWorker:
        words = ("--engine", "reference", "--role", role, "--kv-network", "127.0.0.1", *flags)
        variables = {"ETCD_LEASE_TTL": "3", **UNBOUND, **environment}
        workers.append(RunningWorker(tmp_path, etcd, model_dir, ranks, *words, name=name or role, **variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def ask(frontend: Frontend, model: str, seconds: float = 60, **settings: Any) -> tuple[int, str]:
    """Ask without a stream; return the status and the answer, or what came instead."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 32}
    request = urllib.request.Request(
        f"http://127.0.0.1:{frontend.port}/v1/chat/completions",
        json.dumps(body | settings).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as reply:  # noqa: S310 - the tests' own loopback address
            return reply.status, json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def served(frontend: Frontend, model: str) -> str:
    """Wait until a question is answered, and return the answer."""

    def answer() -> str | None:
        status, text = ask(frontend, model)
        return text if status == 200 else None

    return eventually(answer, "an answer")


@pytest.mark.landing("1-3")
@pytest.mark.parametrize(
    ("prefill_ranks", "decode_ranks"),
    [(3, 1), (1, 3), (3, 3)],
)
def test_a_pair_answers_and_decode_outlives_prefill(
    etcd: EtcdServer,
    start: Start,
    tmp_path: Path,
    model_dir: Path,
    prefill_ranks: int,
    decode_ranks: int,
) -> None:
    decode = start("decode", decode_ranks)
    decode.ready()
    prefill = start("prefill", prefill_ranks)
    prefill.ready()
    model = model_dir.name
    with running_frontend(tmp_path, etcd) as frontend:
        assert served(frontend, model) == ANSWER
        assert {ask(frontend, model)[1] for _ in range(3)} == {ANSWER}

        for pid in prefill.ranks():
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        status, text = ask(frontend, model, seconds=30)
        assert status >= 400, text
        assert time.monotonic() - began < 10
        assert decode.process.poll() is None, decode.text()

        start("prefill", prefill_ranks, name="prefill-again").ready()
        assert served(frontend, model) == ANSWER
    # the runtime writes a traceback where a request comes without its prompt: what the killed prefill worker had promised
    promised = decode.text().count("EngineShutdown: this decode worker got a request without a prefill worker's result")
    assert decode.text().count("Traceback") == promised, decode.text()
    os.kill(decode.rank_zero(), signal.SIGTERM)
    assert decode.wait() == 0, decode.text()


@pytest.mark.landing("prefill")
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_each_role_alone_is_proven_and_healthy(start: Start, role: str) -> None:
    port = system_port()
    canary = {"DYN_HEALTH_CHECK_ENABLED": "true", "DYN_CANARY_WAIT_TIME": "1"}
    worker = start(role, 1, DYN_SYSTEM_PORT=str(port), DYN_SYSTEM_HOST="127.0.0.1", **canary)
    worker.ready()
    eventually(lambda: http_get(f"http://127.0.0.1:{port}/health")[0] == 200, "/health is 200", 20)
    os.kill(worker.rank_zero(), signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


def test_a_lost_kv_fetch_fails_its_request_alone(
    etcd: EtcdServer, start: Start, tmp_path: Path, model_dir: Path
) -> None:
    """No fetch succeeds in a microsecond. If that counted against the decode worker, the frontend would drop it and answer 503."""
    workers = [start("decode", 1, "--kv-pull-timeout", "0.000001"), start("prefill", 1)]
    for worker in workers:
        worker.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        # until the frontend knows both workers it answers 404 or 503
        eventually(lambda: ask(frontend, model_dir.name)[0] == 500, "the worker's error")
        assert {ask(frontend, model_dir.name)[0] for _ in range(4)} == {500}
