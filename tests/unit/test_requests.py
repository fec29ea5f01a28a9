# SPDX-License-Identifier: Apache-2.0
"""Dynamo's requests and responses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, Sampling, TokenChunk
from dynamo_mpi.engines.requests import to_generation_request, to_response


def translate(**parts: Any) -> GenerationRequest:
    return to_generation_request("id", {"token_ids": [5, 6], **parts})


def sampling_of(**options: Any) -> Sampling:
    return translate(sampling_options=options).sampling


def test_a_bare_request_is_greedy_and_unbounded() -> None:
    assert translate() == GenerationRequest("id", (5, 6))
    nothing = {"stop_conditions": None, "sampling_options": None, "output_options": None, "eos_token_ids": None}
    assert translate(**nothing) == GenerationRequest("id", (5, 6))


@pytest.mark.parametrize("request_", [{}, {"token_ids": None}, {"token_ids": []}])
def test_an_empty_prompt_is_left_for_the_engine_to_refuse(request_: dict[str, Any]) -> None:
    assert to_generation_request("id", request_).prompt_token_ids == ()


def test_stop_conditions() -> None:
    request = translate(
        stop_conditions={"max_tokens": 7, "min_tokens": 2, "stop_token_ids": [1], "stop_token_ids_hidden": [2]},
        eos_token_ids=[3],
    )
    assert (request.max_tokens, request.min_tokens, request.stop_token_ids) == (7, 2, frozenset({1, 2, 3}))


def test_ignore_eos_leaves_only_what_the_client_itself_stops_at() -> None:
    request = translate(
        stop_conditions={"ignore_eos": True, "stop_token_ids": [1], "stop_token_ids_hidden": [2]}, eos_token_ids=[3]
    )
    assert request.stop_token_ids == {1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling(0.0, 1.0, 0)),
        ({"temperature": 0}, Sampling(0.0, 1.0, 0)),
        ({"temperature": 0.5}, Sampling(0.5, 1.0, 0)),
        ({"top_p": 0.9}, Sampling(1.0, 0.9, 0)),
        ({"top_k": 5}, Sampling(1.0, 1.0, 5)),
        ({"top_k": 1}, Sampling(0.0, 1.0, 1)),
        ({"top_k": -1, "top_p": 1.0}, Sampling(0.0, 1.0, 0)),
        ({"top_k": 0}, Sampling(0.0, 1.0, 0)),
        ({"temperature": 0, "top_p": 0.5}, Sampling(0.0, 0.5, 0)),
        ({"seed": 7}, Sampling(seed=7)),
        ({"temperature": None, "top_p": None, "top_k": None, "seed": None}, Sampling()),
    ],
)
def test_sampling_is_greedy_unless_asked_otherwise(options: dict[str, Any], expected: Sampling) -> None:
    assert sampling_of(**options) == expected


UNSUPPORTED_SAMPLING = [
    ("n", 2),
    ("best_of", 2),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
    ("repetition_penalty", 1.1),
    ("length_penalty", 0.9),
    ("min_p", 0.1),
    ("use_beam_search", True),
    ("guided_decoding", {"json": "{}"}),
]


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED_SAMPLING)
def test_what_the_engine_cannot_do_is_refused(key: str, value: object) -> None:
    with pytest.raises(RequestError, match=key):
        sampling_of(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("logprobs", 0), ("logprobs", 5), ("prompt_logprobs", 1)])
def test_probabilities_are_refused(key: str, value: int) -> None:
    with pytest.raises(RequestError, match=key):
        translate(output_options={key: value})


def test_neutral_values_are_what_not_asked_for_looks_like() -> None:
    neutral = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "repetition_penalty": 1.0,
        "length_penalty": 1,
        "min_p": 0.0,
        "use_beam_search": False,
        "guided_decoding": None,
    }
    assert neutral.keys() == dict(UNSUPPORTED_SAMPLING).keys()
    assert translate(sampling_options=neutral, output_options={"logprobs": None}) == translate()


def test_a_chunk_in_the_middle_carries_tokens_only() -> None:
    assert to_response(TokenChunk((1, 2)), 5, 2) == {"token_ids": [1, 2], "index": 0}


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_the_last_chunk_carries_reason_and_usage(reason: Any) -> None:
    assert to_response(TokenChunk((), reason), 5, 7) == {
        "token_ids": [],
        "index": 0,
        "finish_reason": reason,
        "completion_usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }


@given(st.lists(st.integers(0, 2**31), max_size=8), st.integers(0, 9), st.floats(0, 2), st.sets(st.integers(0, 99)))
def test_numbers_pass_unchanged(tokens: list[int], most: int, temperature: float, stops: set[int]) -> None:
    request = to_generation_request(
        "id",
        {
            "token_ids": tokens,
            "stop_conditions": {"max_tokens": most, "stop_token_ids": list(stops)},
            "sampling_options": {"temperature": temperature},
        },
    )
    assert request == GenerationRequest("id", tuple(tokens), most, 0, frozenset(stops), Sampling(temperature))
