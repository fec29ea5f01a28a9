# SPDX-License-Identifier: Apache-2.0
"""Two engines of one rank each, one after the other on a prompt: the tokens are those of one engine alone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.common.errors import EngineError, UsageError
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, Sampling
from dynamo_mpi.engines.reference.engine import ReferenceEngine
from dynamo_mpi.engines.reference.kv_server import KvStore
from tests.unit.test_reference_engine import PROMPT, PROMPTS, Receiver, build

pytestmark = pytest.mark.slow

SIZES = {"max_batch_size": 3, "max_num_tokens": 16, "max_seq_len": 160}
KEEP_SECONDS = 3.0


@pytest.fixture(scope="module")
def prefill(tiny_model_dir: Path) -> Iterator[ReferenceEngine]:
    engine = build(tiny_model_dir, **SIZES, kv_network="127.0.0.1", serves_kv=True, kv_keep_seconds=KEEP_SECONDS)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def decode(tiny_model_dir: Path) -> Iterator[ReferenceEngine]:
    engine = build(tiny_model_dir, **SIZES, kv_pull_seconds=1.0)
    engine.start()
    yield engine
    engine.close()


def offer_of(prefill: ReferenceEngine, prompt: tuple[int, ...] = PROMPT, **settings: Any) -> dict[str, Any]:
    receiver = Receiver()
    prefill.submit(GenerationRequest("p", prompt, 1, keep_kv=True, **settings), receiver)
    chunk = receiver.done().chunks[-1]
    assert chunk.kv_transfer_params is not None, chunk
    return dict(chunk.kv_transfer_params)


def go_on(decode: ReferenceEngine, offer: dict[str, Any], name: str = "d", **settings: Any) -> Receiver:
    receiver = Receiver()
    decode.submit(
        GenerationRequest(name, settings.pop("prompt", PROMPT), kv_transfer_params=offer, **settings), receiver
    )
    return receiver


def store_of(prefill: ReferenceEngine) -> KvStore:
    assert prefill._loaded is not None
    store = prefill._loaded.kv_worker._store
    assert store is not None
    return store


def wipe(decode: ReferenceEngine) -> None:
    """So that what an earlier request left in a slot can't pass for what was handed over."""
    assert decode._loaded is not None
    decode._loaded.transformer.cache.keys[:] = 1000
    decode._loaded.transformer.cache.values[:] = 1000


def until_empty(prefill: ReferenceEngine, seconds: float) -> None:
    end = time.monotonic() + seconds
    while prefill.pending_kv_transfers:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def empty(prefill: ReferenceEngine, decode: ReferenceEngine) -> None:
    until_empty(prefill, 6)
    wipe(decode)


@pytest.mark.parametrize("number", range(3))
def test_the_tokens_are_those_of_one_engine(
    prefill: ReferenceEngine, decode: ReferenceEngine, number: int, tiny_tokens: list[list[int]]
) -> None:
    prompt = PROMPTS[number]

    receiver = go_on(decode, offer_of(prefill, prompt), prompt=prompt, max_tokens=24).done()

    assert receiver.tokens == tiny_tokens[number][:24]
    assert receiver.ends == ["length"]


def test_many_at_once_more_than_there_are_slots(
    prefill: ReferenceEngine, decode: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    offers = [offer_of(prefill) for _ in range(5)]

    receivers = [go_on(decode, offer, f"d{number}", max_tokens=8) for number, offer in enumerate(offers)]

    assert [receiver.done().tokens for receiver in receivers] == [tiny_tokens[0][:8]] * 5


def test_what_was_fetched_is_released(prefill: ReferenceEngine, decode: ReferenceEngine) -> None:
    offer = offer_of(prefill)
    assert prefill.pending_kv_transfers == 1

    go_on(decode, offer, max_tokens=2).done()

    until_empty(prefill, 2)
    again = go_on(decode, offer, max_tokens=2).done()
    assert again.ends == ["error"]
    assert "no such transfer" in str(again.chunks[-1].error)


def test_what_is_never_fetched_expires(prefill: ReferenceEngine) -> None:
    began = time.monotonic()
    offer_of(prefill)
    until_empty(prefill, 6)
    assert time.monotonic() - began >= KEEP_SECONDS


def test_a_seed_gives_the_tokens_of_one_engine(prefill: ReferenceEngine, decode: ReferenceEngine) -> None:
    sampling = Sampling(temperature=0.9, seed=7)
    alone = Receiver()
    decode.submit(GenerationRequest("alone", PROMPT, 16, sampling=sampling), alone)

    receiver = go_on(decode, offer_of(prefill, sampling=sampling), max_tokens=16, sampling=sampling).done()

    assert receiver.tokens == alone.done().tokens


def test_the_first_token_may_be_the_last(
    prefill: ReferenceEngine, decode: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    first = tiny_tokens[0][0]

    assert go_on(decode, offer_of(prefill), max_tokens=1).done().ends == ["length"]
    stopped = go_on(decode, offer_of(prefill), stop_token_ids=frozenset({first})).done()
    assert (stopped.tokens, stopped.ends) == ([first], ["stop"])


def test_a_peer_that_says_nothing_ends_this_request_alone(
    prefill: ReferenceEngine, decode: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    offer = offer_of(prefill)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = {**offer, "ranks": [{**offer["ranks"][0], "port": silent.getsockname()[1]}]}
        beside = Receiver()
        began = time.monotonic()
        hopeless = go_on(decode, slow, "hopeless")
        decode.submit(GenerationRequest("beside", PROMPT, 12), beside)
        assert beside.done().tokens == tiny_tokens[0][:12]
        assert hopeless.chunks == [] or time.monotonic() - began > 0.9
        assert hopeless.done().ends == ["error"]
        assert time.monotonic() - began < 5
    assert "timed out" in str(hopeless.chunks[-1].error)
    assert go_on(decode, offer, max_tokens=4).done().tokens == tiny_tokens[0][:4]


def test_a_request_that_waits_for_its_kv_can_be_cancelled(
    prefill: ReferenceEngine, decode: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    offer = offer_of(prefill)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = {**offer, "ranks": [{**offer["ranks"][0], "port": silent.getsockname()[1]}]}
        began = time.monotonic()
        silent.settimeout(5)
        hopeless = go_on(decode, slow, "hopeless")
        with silent.accept()[0]:  # it waits for us now
            decode.cancel("hopeless")
            assert hopeless.done().ends == ["cancelled"]
            assert time.monotonic() - began < 0.9
    assert go_on(decode, offer, max_tokens=4).done().tokens == tiny_tokens[0][:4]


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"kv_heads": 9}, {"prompt_digest": "x"}, {"kind": "nixl"}, {"transport": "x"}, {"ranks": []}],
)
def test_an_offer_that_does_not_fit_is_refused_at_once(
    prefill: ReferenceEngine, decode: ReferenceEngine, change: dict[str, Any]
) -> None:
    with pytest.raises(EngineError):
        go_on(decode, offer_of(prefill) | change)


def test_heads_that_no_rank_holds_are_an_error(prefill: ReferenceEngine, decode: ReferenceEngine) -> None:
    offer = offer_of(prefill)

    receiver = go_on(decode, {**offer, "ranks": [{**offer["ranks"][0], "kv_heads": [0, 2]}]}).done()

    assert "no rank holds KV head 2" in str(receiver.chunks[-1].error)


def test_a_full_store_is_an_error_of_the_request(prefill: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(prefill)
    monkeypatch.setattr(store, "most_tokens", 2 * len(PROMPT) - 1)
    offer_of(prefill)
    receiver = Receiver()
    prefill.submit(GenerationRequest("p", PROMPT, 1, keep_kv=True), receiver)

    assert receiver.done().ends == ["error"]
    assert "waits for decode workers" in str(receiver.chunks[-1].error)


def test_only_a_prefill_engine_makes_offers(prefill: ReferenceEngine, decode: ReferenceEngine) -> None:
    with pytest.raises(EngineError, match="serves no KV"):
        decode.submit(GenerationRequest("p", PROMPT, 1, keep_kv=True), Receiver())
    with pytest.raises(RequestError, match="after its first token"):
        prefill.submit(GenerationRequest("p", PROMPT, 2, keep_kv=True), Receiver())


def test_a_prefill_engine_that_ends_waits_for_what_it_has_offered(
    tiny_model_dir: Path, decode: ReferenceEngine, tiny_tokens: list[list[int]]
) -> None:
    ending = build(tiny_model_dir, **SIZES, serves_kv=True, kv_network="127.0.0.1")
    ending.start()
    offer = offer_of(ending)
    closing = threading.Thread(target=ending.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()

    assert go_on(decode, offer, max_tokens=4).done().tokens == tiny_tokens[0][:4]
    closing.join(2)
    assert not closing.is_alive()


def test_an_address_that_this_host_lacks_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"no address by ib77; it has .*lo 127\.0\.0\.1"):
        build(tiny_model_dir, serves_kv=True, kv_network="ib77")


def test_a_prefill_engine_that_is_gone_is_an_error(tiny_model_dir: Path, decode: ReferenceEngine) -> None:
    gone = build(tiny_model_dir, **SIZES, serves_kv=True, kv_network="127.0.0.1")
    gone.start()
    offer = offer_of(gone)
    gone.close()
    began = time.monotonic()

    receiver = go_on(decode, offer).done()

    assert "refused" in str(receiver.chunks[-1].error).lower()
    assert time.monotonic() - began < 1
