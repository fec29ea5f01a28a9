# SPDX-License-Identifier: Apache-2.0
"""The frontend's event stream, read line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.common.errors import EngineError, ModelNotFoundError
from dynamo_mpi.deploy.local.ask import Answer, NotServedYet, RequestRefused, _refuse, read_events
from dynamo_mpi.deploy.local.workers import prepare_model


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


def test_a_refused_request_is_distinguished_from_an_error() -> None:
    with pytest.raises(RequestRefused) as caught:
        _refuse(400, '{"message":"too many tokens","type":"Bad Request","code":400}')
    assert (caught.value.exit_code, caught.value.problem) == (64, "the request was refused (400): too many tokens")
    with pytest.raises(EngineError, match="the frontend answered 500: it broke"):
        _refuse(500, " it\n broke ")
    with pytest.raises(NotServedYet):
        _refuse(503, "{}")


def test_a_model_is_a_folder_its_config_or_gguf(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert prepare_model(tmp_path / "config.json", tmp_path / "out") == (tmp_path, tmp_path.name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a GGUF file"):
        prepare_model(tmp_path / "tokenizer.json", tmp_path / "out")
