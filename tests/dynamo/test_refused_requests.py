# SPDX-License-Identifier: Apache-2.0
"""What a client gets for a request that the reference engine refuses, through a real frontend: docs/concepts/reference-engine.md lists it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend

pytestmark = pytest.mark.dynamo

CONTEXT = 200
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
# from 1.5 on, a worker pushes its answers, and the frontend passes the reason on
REASONS = tuple(map(int, version("ai-dynamo-runtime").split(".")[:2])) >= (1, 5)
CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
TEXT = {"prompt": "Hello", "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOO_LONG = f"this engine's context is {CONTEXT} tokens"


class Reply(NamedTuple):
    status: int
    text: str


def post(port: int, path: str, body: dict[str, Any]) -> Reply:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - the tests' own loopback address
            return Reply(reply.status, reply.read().decode())
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read().decode(errors="replace"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def served(folder: Path, tiny_model_dir: Path) -> Iterator[tuple[int, str]]:
    """The frontend's port and the model's name, of an aggregated worker."""
    with ExitStack() as stack:
        etcd = EtcdServer(folder)
        stack.callback(etcd.stop)
        etcd.start()
        flags = ("--engine", "reference", "--max-seq-len", str(CONTEXT))
        worker = RunningWorker(folder, etcd, tiny_model_dir, 1, *flags, **UNBOUND)
        stack.callback(worker.stop)
        worker.ready()
        frontend = stack.enter_context(running_frontend(folder, etcd))
        body = {"model": tiny_model_dir.name, **CHAT}
        eventually(lambda: post(frontend.port, "chat/completions", body).status == 200, "an answer")
        yield frontend.port, tiny_model_dir.name


@pytest.mark.parametrize(
    ("path", "body", "reason", "always"),
    [
        ("chat/completions", {**CHAT, "max_tokens": 500}, TOO_LONG, True),
        ("chat/completions", {**CHAT, "logprobs": True}, "logprobs=1 is not supported", True),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "guided_decoding=", True),
        ("chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required"}, "guided_decoding=", False),
        ("chat/completions", {**CHAT, "max_tokens": 500, "stream": True}, TOO_LONG, False),
        ("completions", {**TEXT, "max_tokens": 500}, TOO_LONG, False),
        ("completions", {**TEXT, "presence_penalty": 0.5}, "presence_penalty=0.5 is not supported", False),
        ("completions", {**TEXT, "max_tokens": 500, "stream": True}, TOO_LONG, False),
    ],
    ids=["chat", "logprobs", "guided", "tools", "chat-stream", "text", "penalty", "text-stream"],
)
def test_a_refusal(served: tuple[int, str], path: str, body: dict[str, Any], reason: str, always: bool) -> None:
    port, name = served
    status, text = post(port, path, {"model": name, **body})
    if body.get("stream"):
        assert status == 200
        error = json.loads(text.partition("data: ")[2].partition("\n")[0])["error"]
        status, text = error["code"], error["message"]
    assert (status, reason in text) == ((400, True) if always or REASONS else (500, False)), text
    assert len(text) < 400
    # the worker is as well as before
    assert post(port, "chat/completions", {"model": name, **CHAT}).status == 200


def test_a_pair_refuses_what_does_not_fit(tmp_path: Path, etcd: EtcdServer, tiny_model_dir: Path) -> None:
    """By its decode worker: the prefill worker gets max_tokens 1 in every request."""
    words = ("--engine", "reference", "--kv-network", "127.0.0.1", "--max-seq-len", str(CONTEXT))
    workers = [
        RunningWorker(tmp_path, etcd, tiny_model_dir, 1, *words, "--role", role, name=role, **UNBOUND)
        for role in ("prefill", "decode")
    ]
    try:
        for worker in workers:
            worker.ready()
        body = {"model": tiny_model_dir.name, **CHAT}
        with running_frontend(tmp_path, etcd) as frontend:
            eventually(lambda: post(frontend.port, "chat/completions", body).status == 200, "an answer")
            status, text = post(frontend.port, "chat/completions", {**body, "max_tokens": 500})
            assert (status, TOO_LONG in text) == (400, True), text
            assert post(frontend.port, "chat/completions", body).status == 200
    finally:
        for worker in workers:
            worker.stop()
