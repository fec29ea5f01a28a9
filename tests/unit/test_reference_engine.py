# SPDX-License-Identifier: Apache-2.0
"""The engine's life on one rank, with a tiny model: requests, cancellation, failures, the end; and golden tokens of the real one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.errors import ConfigFileError, EngineError, LayoutError, ModelNotFoundError
from dynamo_mpi.engines.protocol import Engine, GenerationRequest, RequestError, Sampling, TokenChunk
from dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_tokens.json").read_text(encoding="utf-8"))["prompts"]
PROMPTS = tuple(tuple(golden["prompt_token_ids"]) for golden in GOLDEN)
PROMPT = PROMPTS[0]
TIMEOUT_SECONDS = 120
"""Seconds: far more than a busy machine needs."""


class Receiver:
    """Collects the chunks of one request."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.threads: set[str] = set()
        self._first, self._done = threading.Event(), threading.Event()

    def __call__(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self.threads.add(threading.current_thread().name)
        self._first.set()
        if chunk.finish_reason is not None:
            self._done.set()

    def started(self) -> Receiver:
        assert self._first.wait(TIMEOUT_SECONDS)
        return self

    def done(self) -> Receiver:
        assert self._done.wait(TIMEOUT_SECONDS)
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def ends(self) -> list[str]:
        return [chunk.finish_reason for chunk in self.chunks if chunk.finish_reason is not None]


def build(model_dir: Path, **settings: Any) -> ReferenceEngine:
    engine = ReferenceEngine(None, ReferenceConfig(model_dir, **{"tp_size": 1, **settings}))
    engine.load()
    return engine


SMALL = {"max_batch_size": 3, "max_num_tokens": 16, "max_seq_len": 160}
"""On purpose: prompts need several steps, and requests queue."""
LONG = 8000
"""Tokens of a request that is still in flight when the test cancels it."""


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[ReferenceEngine]:
    engine = build(tiny_model_dir, **SMALL)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def long_engine(tiny_model_dir: Path) -> Iterator[ReferenceEngine]:
    """Has a context for `LONG` tokens."""
    engine = build(tiny_model_dir, max_batch_size=3, max_num_tokens=16, max_seq_len=8192)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def own_engine(tiny_model_dir: Path) -> Iterator[ReferenceEngine]:
    """For tests that break or close it."""
    engine = build(tiny_model_dir, max_batch_size=2, max_seq_len=8192)
    yield engine
    engine.close()


def submit(engine: Engine, name: str = "a", prompt: tuple[int, ...] = PROMPT, **settings: Any) -> Receiver:
    receiver = Receiver()
    engine.submit(GenerationRequest(name, prompt, **settings), receiver)
    return receiver


def test_it_reports_what_it_holds(engine: ReferenceEngine) -> None:
    limits = engine.limits

    assert (limits.context_length, limits.max_batch_size, limits.max_num_tokens) == (160, 3, 16)
    assert (limits.kv_block_size, limits.total_kv_blocks) == (32, 15)


def test_the_real_model_gives_the_golden_tokens(model_dir: Path) -> None:
    engine = build(model_dir, **SMALL)
    engine.start()
    receivers = [submit(engine, str(index), PROMPTS[index], max_tokens=8) for index in range(3)]

    assert [receiver.done().tokens for receiver in receivers] == [golden["token_ids"][:8] for golden in GOLDEN[:3]]
    engine.close()


def test_chunked_prompts_and_a_full_batch_give_the_tokens_of_each_alone(
    engine: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    receivers = [submit(engine, str(index), PROMPTS[index], max_tokens=16) for index in range(len(PROMPTS))]

    assert [receiver.done().tokens for receiver in receivers] == [tokens[:16] for tokens in tiny_tokens]
    assert all(receiver.ends == ["length"] for receiver in receivers)
    assert receivers[0].threads == {"reference-engine"}


def test_a_stop_token_ends_the_request(engine: ReferenceEngine, tiny_tokens: list[list[int]]) -> None:
    stop = tiny_tokens[0][7]
    receiver = submit(engine, max_tokens=30, stop_token_ids=frozenset({stop})).done()

    assert receiver.tokens == tiny_tokens[0][: tiny_tokens[0].index(stop) + 1]
    assert receiver.ends == ["stop"]


def test_min_tokens_holds_the_stop_token_back(engine: ReferenceEngine, tiny_tokens: list[list[int]]) -> None:
    stop = tiny_tokens[0][7]
    free = submit(engine, max_tokens=30, stop_token_ids=frozenset({stop})).done()
    held = submit(engine, max_tokens=30, min_tokens=len(free.tokens) + 4, stop_token_ids=frozenset({stop})).done()

    assert free.tokens[-1] == stop
    assert held.tokens[: len(free.tokens) - 1] == free.tokens[:-1]
    assert stop not in held.tokens[: len(free.tokens) + 4]


def test_without_max_tokens_it_fills_the_context(engine: ReferenceEngine) -> None:
    receiver = submit(engine, prompt=PROMPT * 4).done()

    assert len(receiver.tokens) == 160 - 4 * len(PROMPT)
    assert receiver.ends == ["length"]


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine: ReferenceEngine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, seed=11)
    alone = submit(engine, max_tokens=16, sampling=sampling).done()
    company = [submit(engine, f"other {index}", max_tokens=20, sampling=Sampling(1.0)) for index in range(2)]
    again = submit(engine, max_tokens=16, sampling=sampling).done()
    other = submit(engine, max_tokens=16, sampling=Sampling(1.0, 0.95, 50, seed=12)).done()

    assert again.tokens == alone.tokens
    assert other.tokens != alone.tokens
    assert all(len(receiver.done().tokens) == 20 for receiver in company)


def test_cancelling_frees_the_slot_and_spares_the_others(
    long_engine: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    running = [submit(long_engine, str(index), max_tokens=LONG) for index in range(3)]
    for receiver in running:
        receiver.started()
    waiting = submit(long_engine, "waiting", max_tokens=3)

    long_engine.cancel("1")

    assert running[1].done().ends == ["cancelled"]
    assert waiting.done().tokens == tiny_tokens[0][:3]
    assert not running[0].ends
    long_engine.cancel("0")
    long_engine.cancel("2")
    long_engine.cancel("unknown")
    assert [running[index].done().chunks[-1] for index in (0, 2)] == [TokenChunk((), "cancelled")] * 2
    assert running[0].tokens[:20] == tiny_tokens[0][: len(running[0].tokens)][:20]


def test_cancelling_one_that_waits(long_engine: ReferenceEngine) -> None:
    running = [submit(long_engine, str(index), max_tokens=LONG) for index in range(3)]
    waiting = submit(long_engine, "waiting")

    long_engine.cancel("waiting")

    assert waiting.done().chunks == [TokenChunk((), "cancelled")]
    for index, receiver in enumerate(running):
        long_engine.cancel(str(index))
        receiver.done()


def test_an_id_can_be_used_again_once_its_request_has_ended(long_engine: ReferenceEngine) -> None:
    first = submit(long_engine, max_tokens=LONG)
    with pytest.raises(RequestError, match="in flight already"):
        submit(long_engine)
    long_engine.cancel("a")
    first.done()

    assert submit(long_engine, max_tokens=1).done().ends == ["length"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, 49152)}, "token id 49152; this model's ids are 0 to 49151"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"prompt": (1,) * 160}, "the prompt has 160 tokens; this engine's context is 160 tokens"),
        (
            {"prompt": (1,) * 100, "max_tokens": 61},
            "the prompt has 100 tokens and 61 were asked for; this engine's context is 160 tokens: "
            "shorten the prompt or ask for at most 60",
        ),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4"),
        ({"sampling": Sampling(temperature=-1)}, "temperature is -1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
        ({"sampling": Sampling(1.0, top_p=1.5)}, "top_p is 1.5"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    engine: ReferenceEngine, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        submit(engine, **settings)


def test_a_prompt_that_just_fits_is_served(engine: ReferenceEngine) -> None:
    assert len(submit(engine, prompt=(1,) * 159, max_tokens=1).done().tokens) == 1


def test_a_receiver_that_fails_loses_its_own_request_only(
    engine: ReferenceEngine, tiny_tokens: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    def failing(chunk: TokenChunk) -> None:
        raise ConnectionError("the client is gone")

    engine.submit(GenerationRequest("bad", PROMPT, 50), failing)
    good = submit(engine, "good", max_tokens=5).done()

    assert good.tokens == tiny_tokens[0][:5]
    assert "the receiver of request bad failed" in caplog.text
    assert submit(engine, "bad", max_tokens=1).done().ends == ["length"]


def test_closing_cancels_what_is_left(own_engine: ReferenceEngine) -> None:
    own_engine.start()
    running = submit(own_engine, max_tokens=LONG).started()

    own_engine.close()
    own_engine.close()

    assert running.ends == ["cancelled"]
    with pytest.raises(EngineError, match="not running"):
        submit(own_engine, "b")


def test_a_failing_step_ends_every_request_and_notifies_the_owner_once(own_engine: ReferenceEngine) -> None:
    failures: list[BaseException] = []
    notified = threading.Event()

    def note(error: BaseException) -> None:
        failures.append(error)
        notified.set()

    own_engine.on_failure(note)
    own_engine.start()
    running = [submit(own_engine, name, max_tokens=LONG).started() for name in ("a", "b")]
    error = FloatingPointError("the memory is broken")

    def broken(plan: object) -> None:
        raise error

    own_engine._require_loaded().transformer.forward = broken  # type: ignore[method-assign]  # a step that breaks

    for receiver in running:
        assert receiver.done().ends == ["error"]
        assert receiver.chunks[-1].error == "the engine failed: the memory is broken"
    assert notified.wait(TIMEOUT_SECONDS)
    with pytest.raises(EngineError, match="has failed: the memory is broken"):
        submit(own_engine, "c")
    late: list[BaseException] = []
    own_engine.on_failure(late.append)
    own_engine.close()
    assert failures == late == [error]


def test_an_engine_that_is_not_loaded_does_nothing(tiny_model_dir: Path) -> None:
    engine = ReferenceEngine(None, ReferenceConfig(tiny_model_dir, 1))

    for action in (engine.start, engine.follow, lambda: engine.limits, lambda: submit(engine)):
        with pytest.raises(EngineError, match="not loaded"):
            action()
    engine.close()


def test_an_engine_that_is_not_started_takes_no_request(own_engine: ReferenceEngine) -> None:
    with pytest.raises(EngineError, match="not running"):
        submit(own_engine)


@pytest.mark.parametrize(
    ("settings", "kind", "complaint"),
    [
        ({"tp_size": 3}, LayoutError, "has 1 rank; tensor_parallel_size is 3, pipeline_parallel_size 1"),
        ({"pp_size": 2}, LayoutError, "has 1 rank; tensor_parallel_size is 1, pipeline_parallel_size 2"),
        ({"cp_size": 2}, LayoutError, "context_parallel_size is 2"),
        ({"max_batch_size": 0}, ConfigFileError, "max_batch_size is 0"),
        (
            {"max_batch_size": 9, "max_num_tokens": 8},
            ConfigFileError,
            "max_num_tokens 8 is smaller than max_batch_size 9",
        ),
        ({"max_seq_len": 8193}, ConfigFileError, "max_seq_len is 8193, the model's context 8192 tokens"),
        ({"max_batch_size": 10**8, "max_num_tokens": 10**8}, EngineError, "memory is too small"),
        ({"model_dir": Path("absent")}, ModelNotFoundError, "does not exist"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(
    tiny_model_dir: Path, settings: dict[str, Any], kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        build(**{"model_dir": tiny_model_dir, **settings})
