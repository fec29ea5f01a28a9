# SPDX-License-Identifier: Apache-2.0
"""The frontend's event stream, read line by line."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.deploy.local.ask import Answer, read_events


def test_events_end_with_done() -> None:
    lines = [
        b": comment\n",
        b'data: {"a": 1}\r\n',
        b"\r\n",
        b"event: usage\n",
        b'data:{"b": 2}\n',
        b"\n",
        b"data: [DONE]\n",
        b"x",
    ]
    assert list(read_events(lines)) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([b"event: error\n", b": the worker is gone\n", b"\n"], "the worker is gone"),
        ([b"event: error\n", b"data: too late\n"], "too late"),
        ([b'data: {"error": {"message": "no"}}\n'], "no"),
        ([b'data: {"a": 1}\n'], "broke off"),
        ([], "broke off"),
    ],
)
def test_a_stream_that_fails_is_an_error(lines: list[bytes], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        list(read_events(lines))


@pytest.mark.parametrize(("tokens", "rate"), [(0, None), (1, None), (11, 5.0)])
def test_rate_counts_what_came_after_the_first_token(tokens: int, rate: float | None) -> None:
    answer = Answer("x", "stop", 1, tokens, first_token_seconds=1.0, total_seconds=3.0)
    assert answer.tokens_per_second == rate
