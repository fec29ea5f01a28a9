# SPDX-License-Identifier: Apache-2.0
"""What of serving can be tested without a Dynamo deployment; the rest is in ``tests/dynamo``."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import pytest

from dynamo_mpi.engines.protocol import GenerationRequest, Sampling
from dynamo_mpi.engines.requests import to_generation_request
from dynamo_mpi.runtime.runtime_environment import export_runtime_env
from dynamo_mpi.runtime.serving import _first_of, _from_thread, health_payload


def test_the_health_check_is_a_request_that_the_worker_serves() -> None:
    payload = json.loads(json.dumps(health_payload(7)))
    assert to_generation_request("h", payload) == GenerationRequest("h", (7,), 1, 0, frozenset(), Sampling())


def test_the_first_failure_of_the_engines_thread_arrives() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[BaseException] = loop.create_future()
        never: asyncio.Future[int] = loop.create_future()
        errors = [RuntimeError("first"), RuntimeError("second")]

        def fail() -> None:
            for error in errors:
                _from_thread(loop, failed, error)

        thread = threading.Thread(target=fail)
        thread.start()
        await asyncio.wait_for(_first_of(never, failed), 10)
        thread.join()
        await asyncio.sleep(0)
        assert failed.result() is errors[0]
        assert not never.done()

    asyncio.run(body())


def test_the_runtime_is_pointed_at_the_living(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://dead:1,http://alive:2")
    export_runtime_env(["http://alive:2", "http://dead:1"])
    assert os.environ["ETCD_ENDPOINTS"] == "http://alive:2,http://dead:1"


@pytest.mark.parametrize(
    ("given", "expected"), [("", None), ("h:4222", "nats://h:4222"), ("nats://h", "nats://h"), ("tls://h", "tls://h")]
)
def test_the_runtime_is_given_no_address_that_it_can_not_read(
    given: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://a:1")
    monkeypatch.setenv("NATS_SERVER", given)
    export_runtime_env(["http://a:1"])
    assert os.environ.get("NATS_SERVER") == expected


def test_the_runtime_is_given_no_empty_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://a:1")
    for name, value in (
        ("ETCD_AUTH_USERNAME", ""),
        ("ETCD_AUTH_CA", "PEM"),
        ("NATS_AUTH_TOKEN", ""),
        ("NATS_AUTH_NKEY", "SU"),
    ):
        monkeypatch.setenv(name, value)
    export_runtime_env(["http://a:1"])
    assert {"ETCD_AUTH_CA", "NATS_AUTH_NKEY"} <= os.environ.keys()
    assert not {"ETCD_AUTH_USERNAME", "NATS_AUTH_TOKEN"} & os.environ.keys()
