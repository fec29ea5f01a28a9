# SPDX-License-Identifier: Apache-2.0
"""What of serving can be told without a Dynamo deployment; the rest is in ``tests/dynamo``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading

import pytest

from dynamo_mpi.engines.protocol import GenerationRequest, Sampling
from dynamo_mpi.launchers.time_limit import TIME_IS_UP
from dynamo_mpi.serving.requests import to_generation_request
from dynamo_mpi.serving.service import _first_of, _from_thread, _StopSignals, health_payload, point_runtime_at


def test_the_health_check_is_a_request_that_the_worker_serves() -> None:
    payload = json.loads(json.dumps(health_payload(7)))
    assert to_generation_request("h", payload) == GenerationRequest("h", (7,), 1, 0, frozenset(), Sampling())


def test_two_signals_are_told_apart_and_more_are_ignored() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        said: list[str] = []
        stop = _StopSignals(loop, said.append)
        try:
            assert not stop.first.done()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(stop.first, 10) == signal.SIGTERM
            # a warning hurries nobody
            os.kill(os.getpid(), signal.SIGUSR1)
            stop.warn("the job's time ends")
            await asyncio.sleep(0.01)
            assert (stop.second.done(), said) == (False, [])
            os.kill(os.getpid(), signal.SIGINT)
            assert await asyncio.wait_for(stop.second, 10) == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                loop.remove_signal_handler(number)

    before = signal.getsignal(signal.SIGINT)
    try:
        asyncio.run(body())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_warning_is_a_reason_to_stop() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        said: list[str] = []
        stop = _StopSignals(loop, said.append)
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await asyncio.wait_for(stop.first, 10) == signal.SIGUSR1
            assert said == [TIME_IS_UP]
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                loop.remove_signal_handler(number)

    before = signal.getsignal(signal.SIGINT)
    try:
        asyncio.run(body())
    finally:
        signal.signal(signal.SIGINT, before)


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
    point_runtime_at(["http://alive:2", "http://dead:1"])
    assert os.environ["ETCD_ENDPOINTS"] == "http://alive:2,http://dead:1"
