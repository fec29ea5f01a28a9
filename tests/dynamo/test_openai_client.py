# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's own Python client sees of one stack: three ranks, real tokens."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.dynamo.local_command import LocalCommand
from tests.dynamo.running import eventually

pytestmark = pytest.mark.dynamo

SLOTS = 4
"""max_batch_size of the engine."""

CONTEXT_LENGTH = 2048
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


class Served:
    """The running stack, seen from a client."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.url, self.model = report["url"], report["model"]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def chat(self, **options: Any) -> Any:
        """Ask for the capital of France."""
        options = {"messages": QUESTION, "max_tokens": 32, "temperature": 0} | options
        return self.client.chat.completions.create(model=self.model, **options)

    def complete(self, prompt: str, **options: Any) -> Any:
        """Continue a raw prompt."""
        return self.client.completions.create(model=self.model, prompt=prompt, **{"temperature": 0} | options)

    def metric(self, name: str, *labels: str) -> float:
        """Return the sum of the frontend's samples of a metric that carry all of the labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as reply:  # noqa: S310 - our own loopback address
            lines = reply.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if re.match(rf"{name}[{{ ]", line) and all(label in line for label in labels)
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One stack for all tests of this file."""
    folder = tmp_path_factory.mktemp("served")
    with LocalCommand(folder, "--keep", "--output", "json", "--max-batch-size", str(SLOTS)) as command:
        served = Served(command.report())
        command.wait_for_text("serving until")
        yield served
        command.process.terminate()
        assert command.wait(60) == 143, command.err
        command.assert_nothing_left()


def test_model_is_listed_with_its_context(served: Served) -> None:
    models = served.client.models.list().data
    assert [model.id for model in models] == [served.model] == ["SmolLM2-135M-Instruct"]
    assert (models[0].model_extra or {})["context_window"] == CONTEXT_LENGTH


def test_chat(served: Served) -> None:
    reply = served.chat()
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 8  # seven of text and the end token
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_streamed_chat_is_the_same_in_pieces(served: Served) -> None:
    events = list(served.chat(stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 1
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert [event.usage.completion_tokens for event in events if event.usage] == [8]


def test_raw_prompt_is_continued_without_a_chat_template(served: Served) -> None:
    reply = served.complete("The capital of France is", max_tokens=1)
    assert reply.choices[0].text == " Paris"
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 1)


def test_token_ids_are_a_prompt_too(served: Served) -> None:
    text = served.complete("The capital of France is", max_tokens=4).choices[0].text
    ids: Any = [504, 3575, 282, 4649, 314]
    assert served.complete(ids, max_tokens=4).choices[0].text == text


@pytest.mark.parametrize("limit", [1, 3, 20])
def test_max_tokens_is_kept(served: Served, limit: int) -> None:
    reply = served.complete("Once upon a time", max_tokens=limit)
    assert reply.usage.completion_tokens == limit
    assert reply.choices[0].finish_reason == "length"


def test_stop_string_ends_the_answer_before_it(served: Served) -> None:
    whole = served.complete("One, two, three, four,", max_tokens=30).choices[0].text
    assert "seven" in whole
    stopped = served.complete("One, two, three, four,", max_tokens=30, stop=["seven"])
    assert stopped.choices[0].text == whole.partition("seven")[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 30


def test_a_seed_repeats_a_sampled_answer(served: Served) -> None:
    def sample(seed: int) -> str:
        text: str = served.complete("Once upon a time", max_tokens=12, temperature=1.0, seed=seed).choices[0].text
        return text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_four_at_once_answer_as_one_alone(served: Served) -> None:
    prompts = ["The capital of France is", "One, two, three,", "Once upon a time", "Water is made of"]
    alone = [served.complete(prompt, max_tokens=12).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: served.complete(prompt, max_tokens=12).choices[0].text, prompts))
    assert together == alone


def test_more_requests_than_slots_queue(served: Served) -> None:
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        replies = list(pool.map(lambda _: served.chat().choices[0].message.content, range(2 * SLOTS)))
    assert replies == [ANSWER] * 2 * SLOTS


def test_cancelled_requests_give_their_slots_back(served: Served) -> None:
    """Every slot is taken by an answer of minutes; after the client hangs up, the next one is served at once."""
    cancelled_before = served.metric("dynamo_frontend_requests_total", 'error_type="cancelled"')
    began = time.monotonic()
    streams = [
        served.complete("Once upon a time", max_tokens=1900, stream=True, extra_body={"ignore_eos": True})
        for _ in range(SLOTS)
    ]
    for stream in streams:
        next(iter(stream))
    taken = time.monotonic() - began
    for stream in streams:
        stream.close()
    asked = time.monotonic()
    assert served.chat().choices[0].message.content == ANSWER
    waited = time.monotonic() - asked
    assert waited < 10 + taken
    cancelled = served.metric("dynamo_frontend_requests_total", 'error_type="cancelled"') - cancelled_before
    assert cancelled == SLOTS
    eventually(lambda: served.metric("dynamo_frontend_inflight_requests") == 0, "nothing in flight", 10)


def test_a_prompt_beyond_the_context_is_a_bad_request(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.complete("word " * (CONTEXT_LENGTH + 1), max_tokens=1)
    assert f"maximum context length is {CONTEXT_LENGTH} tokens" in str(caught.value)


def test_more_output_than_the_context_holds_is_a_bad_request_in_our_words(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="this engine's context is 2048 tokens"):
        served.chat(max_tokens=CONTEXT_LENGTH)


@pytest.mark.parametrize("option", [{"n": 2, "temperature": 1}, {"logprobs": True}, {"presence_penalty": 1.0}], ids=str)
def test_what_the_engine_cannot_do_is_a_bad_request_in_our_words(served: Served, option: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"is not supported by this engine; leave it out"):
        served.chat(**option)


def test_an_unknown_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="no-such-model", prompt="x", max_tokens=1)


def test_a_refused_request_harms_no_other(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        served.chat(presence_penalty=1.0)
    assert served.chat().choices[0].message.content == ANSWER
