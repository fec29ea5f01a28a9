# SPDX-License-Identifier: Apache-2.0
"""The first completion: a real one before the worker is visible to anyone."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from dynamo_mpi.common.errors import EngineError, PhaseTimeoutError
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, TokenChunk
from dynamo_mpi.engines.reference.config import ReferenceConfig
from dynamo_mpi.engines.reference.engine import ReferenceEngine
from dynamo_mpi.runtime.engine_runner import run_first_completion
from tests.unit.engines import ScriptedEngine


def test_a_working_engine_passes_with_one_greedy_request_of_two_tokens() -> None:
    requests: list[GenerationRequest] = []

    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        requests.append(request)
        yield TokenChunk((7,))
        yield TokenChunk((8,), "length")

    start = time.monotonic()
    with ScriptedEngine(script) as engine:
        seconds = run_first_completion(engine, 5, 30)
    assert 0 < seconds <= time.monotonic() - start
    (request,) = requests
    assert (request.prompt_token_ids, request.max_tokens, request.sampling.temperature) == ((5,), 2, 0)


@pytest.mark.parametrize(
    "chunks",
    [
        [TokenChunk((1, 2), "length")],
        [TokenChunk((1,)), TokenChunk((2,)), TokenChunk((), "length")],
        # a model may well have nothing to say after a lone first token
        [TokenChunk((1,), "stop")],
    ],
)
def test_however_the_tokens_come(chunks: list[TokenChunk]) -> None:
    with ScriptedEngine(lambda _: chunks) as engine:
        assert run_first_completion(engine, 1, 30) > 0


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([TokenChunk((), "error", "a rank died")], "a rank died"),
        ([TokenChunk((1,)), TokenChunk((), "error", "a rank died")], "a rank died"),
        ([TokenChunk((), "length")], "0 tokens"),
        ([TokenChunk((), "cancelled")], "cancelled"),
        ([TokenChunk((1,)), TokenChunk((), "cancelled")], "cancelled"),
    ],
)
def test_a_completion_that_is_none(chunks: list[TokenChunk], words: str) -> None:
    with ScriptedEngine(lambda _: chunks) as engine, pytest.raises(EngineError, match=words) as caught:
        run_first_completion(engine, 1, 30)
    assert caught.value.exit_code == 70


@pytest.mark.parametrize("refusal", [RequestError("unknown token id"), EngineError("it has stopped")])
def test_an_engine_that_refuses(refusal: Exception) -> None:
    with ScriptedEngine() as engine:
        engine.refusal = refusal
        with pytest.raises(EngineError, match=str(refusal)):
            run_first_completion(engine, 1, 30)


@pytest.mark.parametrize("made", [0, 1])
def test_an_engine_that_hangs_meets_the_deadline(made: int) -> None:
    release = threading.Event()

    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        for token in range(made):
            yield TokenChunk((token,))
        release.wait(30)
        yield TokenChunk((), "length")

    start = time.monotonic()
    with ScriptedEngine(script) as engine:
        try:
            with pytest.raises(PhaseTimeoutError, match=rf"0\.2 s.*{made} of 2 tokens") as caught:
                run_first_completion(engine, 1, 0.2)
        finally:
            release.set()
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == 124
    assert "--warmup-timeout" in caught.value.fix


def test_a_trickle_does_not_extend_the_deadline() -> None:
    stop = threading.Event()

    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        while not stop.wait(0.01):
            yield TokenChunk(())
        yield TokenChunk((), "length")

    with ScriptedEngine(script) as engine:
        try:
            with pytest.raises(PhaseTimeoutError):
                run_first_completion(engine, 1, 0.2)
        finally:
            stop.set()


def test_damaged_weights_are_found_before_the_worker_registers(tiny_model_dir: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    with weights.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)  # not a number, in every format of weights
    engine = ReferenceEngine(None, ReferenceConfig(damaged, 1))
    engine.load()
    engine.start()
    try:
        for _ in range(2):  # it goes on after such a request
            with pytest.raises(EngineError, match="weights are damaged"):
                run_first_completion(engine, 1, 30)
    finally:
        engine.close()
