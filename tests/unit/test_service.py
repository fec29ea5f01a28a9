# SPDX-License-Identifier: Apache-2.0
"""What of serving can be tested without a Dynamo deployment; the rest is in ``tests/dynamo``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from unittest import mock

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.engines.protocol import GenerationRequest, Sampling
from dynamo_mpi.engines.requests import to_generation_request
from dynamo_mpi.runtime import serving
from dynamo_mpi.runtime.runtime_environment import export_runtime_env
from dynamo_mpi.runtime.serving import Registration, _first_of, _from_thread, health_payload, serve


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


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_port_that_is_found_taken_when_the_model_is_registered_is_no_ready_worker(
    monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    steps: list[str] = []
    bound, answered = threading.Event(), threading.Event()

    class Endpoint:
        """The runtime's, which binds its port after the model's card is written."""

        async def serve_endpoint(self, *_: object, **__: object) -> None:
            await asyncio.to_thread(bound.wait, 10)
            answered.set()
            if is_taken:
                raise RuntimeError("Address already in use (os error 98)")
            await asyncio.Event().wait()

        def connection_id(self) -> int:
            return 7

    class Runtime:
        def __init__(self, *_: object) -> None: ...

        def endpoint(self, _: str) -> Endpoint:
            return Endpoint()

        def shutdown(self) -> None: ...

    async def step(name: str) -> bool:
        steps.append(name)
        return True

    def find_instance(_: int) -> None:
        steps.append("instance")
        bound.set()
        # the failure comes while the instance is looked for
        assert answered.wait(10)

    for name, members in (
        ("dynamo.runtime", {"DistributedRuntime": Runtime}),
        ("dynamo.llm.exceptions", dict.fromkeys(("EngineShutdown", "InvalidArgument", "Unknown"), RuntimeError)),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(serving, "_register_model", lambda *_: step("model"))
    monkeypatch.setattr(serving, "_deregister", lambda _: step("deregister"))
    monkeypatch.setattr(serving, "_SHUTDOWN_SECONDS", 0.1)
    drains: list[Callable[[int], object]] = []

    def on_ready() -> None:
        steps.append("ready")
        drains[0](signal.SIGTERM)

    body = serve(
        Registration("/m", "m", "dyn://a.b.c", "tcp", "etcd", 1, 1.0),
        mock.Mock(pending_kv_transfers=0),
        PhaseTracker(),
        mock.Mock(),
        find_instance,
        on_ready,
        mock.Mock(),
        drains.append,
    )
    if is_taken:
        with pytest.raises(UsageError, match="can't bind its port"):
            asyncio.run(body)
        assert steps == ["model", "instance", "deregister"]
    else:
        asyncio.run(body)
        assert steps == ["model", "instance", "ready", "deregister"]


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
