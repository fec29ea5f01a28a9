# SPDX-License-Identifier: Apache-2.0
"""How the readiness check finds the worker among others, and what it asks."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dynamo_mpi.common.host_address import is_here
from dynamo_mpi.common.ports import holds_port
from dynamo_mpi.engines.trtllm.readiness_main import Completion, ask, completion_request, find_instance, judge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def instance(number: int, address: str, kind: str = "tcp") -> Any:
    return SimpleNamespace(instance_id=number, transport=SimpleNamespace(kind=kind, address=address))


class Client:
    """Shows one list of instances after the other, and the last one from then on."""

    def __init__(self, *lists: list[Any]) -> None:
        self.lists = list(lists)

    def instances(self) -> list[Any]:
        return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]


def test_a_listener_is_found_by_its_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
    ):
        ports = [listener.getsockname()[1] for listener in (server, six)]
        assert all(holds_port(os.getpid(), port) for port in ports)
        other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        assert not holds_port(other.pid, ports[0])
        other.communicate(b"")
        assert not holds_port(other.pid, ports[0])
    assert not any(holds_port(os.getpid(), port) for port in ports)


def test_an_address_of_this_host_is_distinguished_from_others() -> None:
    assert all(is_here(host) for host in ("127.0.0.1", "localhost", "::1"))
    assert not any(is_here(host) for host in ("192.0.2.77", "no.such.host.invalid", ""))


def test_our_instance_is_found_among_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = instance(5, f"127.0.0.1:{server.getsockname()[1]}/abc/generate")
        # on another host, with the same port
        other = instance(4, f"192.0.2.77:{server.getsockname()[1]}/a/generate")
        client = Client([], [other], [other, ours])
        assert asyncio.run(find_instance(client, os.getpid())) == 5


def test_over_nats_it_is_the_one_that_came() -> None:
    old, new = instance(1, "a.b.generate-1", "nats_tcp"), instance(2, "a.b.generate-2", "nats_tcp")
    # a client's first list is empty in any case
    assert asyncio.run(find_instance(Client([], *[[old]] * 12, [old, new]), os.getpid())) == 2


@pytest.mark.parametrize("role", ["agg", "prefill", "decode"])
def test_a_role_that_needs_a_peer_is_asked_for_both_steps(role: str) -> None:
    request = completion_request(role, 7)
    assert request["token_ids"] == [7]
    assert request["stop_conditions"]["max_tokens"] == 2
    assert ("disaggregated_params" in request) is (role != "agg")
    assert request["output_options"] == {}
    checked = completion_request(role, 7, 8, log_probs=True)
    assert (checked["stop_conditions"]["max_tokens"], checked["output_options"]) == (8, {"logprobs": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_log_probabilities_that_are_no_numbers_are_an_error(value: float | None) -> None:
    with pytest.raises(RuntimeError, match="1 of 3 log probabilities are no numbers"):
        judge(Completion([1, 2, 3], [-0.5, value, 0.0]))


def test_one_token_over_and_over_is_a_warning() -> None:
    assert "8 times token 5" in judge(Completion([5] * 8, [-0.1] * 8))
    assert judge(Completion([5] * 7 + [6], [])) == ""
    # the first completion alone is too short to show it
    assert judge(Completion([5, 5], [])) == ""


class Engine:
    """Answers the first completion; the second one as ``checked`` is: with an error, with this chunk, or, for None, never."""

    def __init__(self, checked: Exception | dict[str, Any] | None) -> None:
        self.checked = checked

    async def direct(self, request: dict[str, Any], number: int) -> AsyncIterator[Any]:
        assert number == 5
        is_second = request["stop_conditions"]["max_tokens"] > 2
        answer = self.checked if is_second else {"token_ids": [1, 2]}
        if isinstance(answer, Exception):
            raise answer
        return self._chunks(answer)

    async def _chunks(self, data: dict[str, Any] | None) -> AsyncIterator[Any]:
        if data is None:
            await asyncio.Event().wait()
        yield SimpleNamespace(is_error=lambda: False, data=lambda: data)


def warning_of(checked: Exception | dict[str, Any] | None, *, log_probs: bool = True, seconds: float = 60.0) -> str:
    arguments = argparse.Namespace(role="agg", token_id=7, log_probs=log_probs)
    return asyncio.run(ask(Engine(checked), arguments, 5, seconds))


def test_a_second_completion_that_never_comes_is_a_warning() -> None:
    assert warning_of(None, seconds=0.01) == "log probabilities were not checked: no answer in 0.01 s"


def test_a_second_completion_that_fails_is_a_warning_with_its_reason() -> None:
    refused = RuntimeError("logits are\nNaN")
    assert warning_of(refused) == "log probabilities were not checked: RuntimeError: logits are NaN"
    assert warning_of(refused, log_probs=False) == "a longer answer was not checked: RuntimeError: logits are NaN"


def test_a_second_completion_is_judged() -> None:
    assert warning_of({"token_ids": [1, 2, 3], "log_probs": [-0.5, -0.1, -0.2]}) == ""
    assert "8 times token 5" in warning_of({"token_ids": [5] * 8})
    with pytest.raises(RuntimeError, match="no numbers"):
        warning_of({"token_ids": [1], "log_probs": [None]})
