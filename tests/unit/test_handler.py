# SPDX-License-Identifier: Apache-2.0
"""The endpoint's handler, driven as the runtime drives it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import sys
import threading
from collections.abc import Coroutine, Iterable
from typing import Any

import pytest

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.runtime.serving_handler import RequestHandler, RuntimeErrors, _ChunkQueue
from tests.unit.engines import Script, ScriptedEngine

TIMEOUT = 20.0


class InvalidArgumentError(Exception):
    pass


class EngineShutdownError(Exception):
    pass


class RequestFailedError(Exception):
    pass


ERRORS = RuntimeErrors(InvalidArgumentError, EngineShutdownError, RequestFailedError)


class Context:
    """The runtime's context of one request."""

    def __init__(self, request_id: str = "r1") -> None:
        self._id = request_id
        self.stopped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def id(self) -> str:
        return self._id

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        return self.stopped


class Sender:
    """The runtime's response sender; breaks after ``breaks_after`` responses, as when the client is gone."""

    def __init__(self, breaks_after: int = 1_000_000) -> None:
        self.sent: list[dict[str, Any]] = []
        self.closed = False
        self._breaks_after = breaks_after

    def send(self, response: dict[str, Any]) -> None:
        if len(self.sent) == self._breaks_after:
            raise ConnectionError("the client has gone")
        self.sent.append(response)

    def close(self) -> None:
        self.closed = True


def handler_of(engine: ScriptedEngine) -> RequestHandler:
    return RequestHandler(engine, ERRORS)


def prompt(max_tokens: int = 4) -> dict[str, Any]:
    return {"token_ids": [1, 2, 3], "stop_conditions": {"max_tokens": max_tokens}}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's body; whatever the loop complains about fails the test."""

    async def body() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        await asyncio.wait_for(coroutine, TIMEOUT)
        gc.collect()
        await asyncio.sleep(0)
        assert complaints == []

    asyncio.run(body())


def tokens_of(responses: Iterable[dict[str, Any]]) -> list[int]:
    return [token for response in responses for token in response["token_ids"]]


async def endless_until(event: threading.Event, handler: RequestHandler) -> None:
    """Wait, without blocking the loop, until the engine's thread has set ``event``."""
    await asyncio.get_running_loop().run_in_executor(None, event.wait, TIMEOUT)
    assert event.is_set()
    assert handler.in_flight == 1


def endless(started: threading.Event) -> Script:
    """Return a script that makes one token and then none until the request is cancelled."""

    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        yield TokenChunk((0,))
        started.set()
        while True:
            # an empty chunk is where the engine looks whether it is still wanted
            threading.Event().wait(0.001)
            yield TokenChunk(())

    return script


def test_the_signature_has_the_name_that_the_runtime_looks_for() -> None:
    assert list(inspect.signature(RequestHandler.generate).parameters) == [
        "self",
        "request",
        "context",
        "response_sender",
    ]


def test_pull() -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler = handler_of(engine)
            responses = [response async for response in handler.generate(prompt(), Context())]
            assert tokens_of(responses) == [0, 1, 2, 3]
            assert [response.get("finish_reason") for response in responses][-1] == "length"
            assert all("finish_reason" not in response for response in responses[:-1])
            usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            assert responses[-1]["completion_usage"] == usage
            assert handler.in_flight == 0

    run(body())


def test_push() -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler, sender = handler_of(engine), Sender()
            assert [response async for response in handler.generate(prompt(), Context(), sender)] == []
            assert tokens_of(sender.sent) == [0, 1, 2, 3]
            assert sender.sent[-1]["completion_usage"]["completion_tokens"] == 4
            assert sender.closed
            assert handler.in_flight == 0

    run(body())


def test_a_request_that_has_ended_is_not_cancelled_afterwards() -> None:
    """A client that tries again with the same id would lose its second try."""

    async def body() -> None:
        with ScriptedEngine() as engine:
            handler = handler_of(engine)
            for _ in range(3):
                responses = [response async for response in handler.generate(prompt(), Context("same"))]
                assert tokens_of(responses) == [0, 1, 2, 3]
            for _ in range(5):
                await asyncio.sleep(0)
            assert engine.cancelled == []

    run(body())


@pytest.mark.parametrize("push", [False, True])
def test_a_stopped_request_ends_soon(push: bool) -> None:
    async def body() -> None:
        started = threading.Event()
        with ScriptedEngine(endless(started)) as engine:
            handler, context, sender = handler_of(engine), Context(), Sender()
            stream = handler.generate(prompt(), context, sender if push else None)

            async def drain() -> list[dict[str, Any]]:
                return [response async for response in stream]

            draining = asyncio.ensure_future(drain())
            await endless_until(started, handler)
            context.stopped.set_result(True)
            responses = await draining
            last = (sender.sent if push else responses)[-1]
            assert last["finish_reason"] == "cancelled"
            assert set(engine.cancelled) == {"r1"}
            assert handler.in_flight == 0

    run(body())


def test_a_request_that_is_cut_off_ends_with_engine_shutdown() -> None:
    async def body() -> None:
        started = threading.Event()
        with ScriptedEngine(endless(started)) as engine:
            handler = handler_of(engine)

            async def drain() -> list[dict[str, Any]]:
                return [response async for response in handler.generate(prompt(), Context())]

            draining = asyncio.ensure_future(drain())
            await endless_until(started, handler)
            handler.cut_off_all()
            with pytest.raises(EngineShutdownError, match="before the answer was complete"):
                await draining
            assert handler.in_flight == 0

    run(body())


def test_a_request_stopped_before_it_began_ends_too() -> None:
    async def body() -> None:
        with ScriptedEngine(endless(threading.Event())) as engine:
            handler, context = handler_of(engine), Context()
            context.stopped.set_result(True)
            responses = [response async for response in handler.generate(prompt(), context)]
            assert responses[-1]["finish_reason"] == "cancelled"

    run(body())


@pytest.mark.parametrize("push", [False, True])
def test_a_client_that_goes_away_ends_its_request(push: bool) -> None:
    """The runtime cancels the task that drives the generator."""

    async def body() -> None:
        started = threading.Event()
        with ScriptedEngine(endless(started)) as engine:
            handler = handler_of(engine)
            stream = handler.generate(prompt(), Context(), Sender() if push else None)

            async def drain() -> None:
                async for _ in stream:
                    pass

            draining = asyncio.ensure_future(drain())
            await endless_until(started, handler)
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining
            assert engine.cancelled[:1] == ["r1"]
            assert handler.in_flight == 0

    run(body())


def test_a_generator_closed_half_way_ends_its_request() -> None:
    async def body() -> None:
        with ScriptedEngine(endless(threading.Event())) as engine:
            handler = handler_of(engine)
            stream = handler.generate(prompt(), Context())
            assert (await stream.__anext__())["token_ids"][:1] == [0]
            assert handler.in_flight == 1
            await stream.aclose()
            assert engine.cancelled[:1] == ["r1"]
            assert handler.in_flight == 0

    run(body())


def test_a_sender_that_breaks_ends_its_request_at_once() -> None:
    async def body() -> None:
        with ScriptedEngine(endless(threading.Event())) as engine:
            handler = handler_of(engine)
            stream = handler.generate(prompt(), Context(), Sender(breaks_after=1))
            with pytest.raises(ConnectionError) as caught:
                async for _ in stream:
                    pass
            assert caught.tb is not None  # as somebody who logs the error would keep the frames alive
            assert handler.in_flight == 0
            assert engine.cancelled[:1] == ["r1"]

    run(body())


@pytest.mark.parametrize("push", [False, True])
def test_a_generator_that_is_never_run_starts_nothing(push: bool) -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler = handler_of(engine)
            await handler.generate(prompt(), Context(), Sender() if push else None).aclose()
            assert handler.in_flight == 0
            assert engine.cancelled == []

    run(body())


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"token_ids": []}, "empty"),
        ({"token_ids": [1], "sampling_options": {"n": 2}}, "n=2"),
        ({"token_ids": [1], "output_options": {"logprobs": 1}}, "logprobs"),
    ],
)
def test_a_bad_request_is_the_clients_fault(request_: dict[str, Any], words: str, push: bool) -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler, sender = handler_of(engine), Sender()
            with pytest.raises(InvalidArgumentError, match=words):
                async for _ in handler.generate(request_, Context(), sender if push else None):
                    pass
            assert handler.in_flight == 0
            assert not sender.closed
            assert engine.cancelled == []

    run(body())


def test_an_engine_that_no_longer_takes_requests_is_not_the_clients_fault() -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler = handler_of(engine)
            engine.refusal = EngineError("closed")
            with pytest.raises(EngineShutdownError, match="closed"):
                async for _ in handler.generate(prompt(), Context()):
                    pass
            assert handler.in_flight == 0

    run(body())


def test_an_engine_that_fails_half_way_lets_the_frontend_try_elsewhere() -> None:
    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        yield TokenChunk((0,))
        yield TokenChunk((), "error", "a rank died")

    async def body() -> None:
        with ScriptedEngine(script) as engine:
            handler, sender = handler_of(engine), Sender()
            with pytest.raises(EngineShutdownError, match="a rank died"):
                async for _ in handler.generate(prompt(), Context(), sender):
                    pass
            assert not sender.closed
            assert handler.in_flight == 0
            assert engine.cancelled == []

    run(body())


def test_an_error_of_one_request_does_not_count_against_the_worker() -> None:
    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        yield TokenChunk((), "error", "its KV could not be fetched", engine_failed=False)

    async def body() -> None:
        with ScriptedEngine(script) as engine, pytest.raises(RequestFailedError, match="could not be fetched"):
            async for _ in handler_of(engine).generate(prompt(), Context()):
                pass

    run(body())


def test_quiet_is_when_the_last_request_has_ended() -> None:
    async def body() -> None:
        with ScriptedEngine(endless(threading.Event())) as engine:
            handler = handler_of(engine)
            assert await handler.wait_idle(0)
            first, second = handler.generate(prompt(), Context("a")), handler.generate(prompt(), Context("b"))
            await first.__anext__()
            waiting = asyncio.ensure_future(second.__anext__())
            while handler.in_flight < 2:
                await asyncio.sleep(0)
            assert not await handler.wait_idle(0.01)
            quiet = asyncio.ensure_future(handler.wait_idle(TIMEOUT))
            await first.aclose()
            await waiting
            assert handler.in_flight == 1
            assert not quiet.done()
            await second.aclose()
            assert await quiet
            assert handler.in_flight == 0

    run(body())


def test_every_change_of_what_is_in_flight_is_reported() -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            counts: list[int] = []
            handler = RequestHandler(engine, ERRORS, on_in_flight=counts.append)
            first, second = (handler.generate(prompt(), Context(name)) for name in ("a", "b"))
            await anext(first)
            await anext(second)
            await first.aclose()
            await second.aclose()
            assert counts == [1, 2, 1, 0]

    run(body())


def test_many_requests_at_once_get_their_own_tokens() -> None:
    async def body() -> None:
        with ScriptedEngine() as engine:
            handler = handler_of(engine)

            async def one(number: int) -> list[int]:
                context = Context(f"r{number}")
                return tokens_of([response async for response in handler.generate(prompt(number), context)])

            answers = await asyncio.gather(*(one(number) for number in range(1, 60)))
            assert answers == [list(range(number)) for number in range(1, 60)]
            assert handler.in_flight == 0

    run(body())


@pytest.mark.parametrize("count", [1, 2, 20_000])
def test_no_chunk_is_lost_or_reordered(count: int) -> None:
    """A producer as fast as Python allows, with threads changed over as often as it allows."""

    async def body() -> None:
        mailbox = _ChunkQueue(asyncio.get_running_loop())

        def produce() -> None:
            for token in range(count):
                mailbox.put(TokenChunk((token,), "stop" if token == count - 1 else None))

        thread = threading.Thread(target=produce)
        thread.start()
        seen: list[int] = []
        while True:
            chunk = await mailbox.get()
            seen += chunk.token_ids
            if chunk.finish_reason is not None:
                break
        thread.join()
        assert chunk.finish_reason == "stop"
        assert seen == list(range(count))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run(body())
    finally:
        sys.setswitchinterval(interval)


def test_a_slow_producer_is_heard_chunk_by_chunk() -> None:
    async def body() -> None:
        mailbox = _ChunkQueue(asyncio.get_running_loop())
        loop = asyncio.get_running_loop()
        for token in range(200):
            await loop.run_in_executor(None, mailbox.put, TokenChunk((token,)))
            assert (await mailbox.get()).token_ids == (token,)

    run(body())


def test_what_has_piled_up_is_one_chunk() -> None:
    async def body() -> None:
        mailbox = _ChunkQueue(asyncio.get_running_loop())
        for chunk in (TokenChunk((1,)), TokenChunk((2, 3)), TokenChunk((), "error", "why")):
            mailbox.put(chunk)
        assert await mailbox.get() == TokenChunk((1, 2, 3), "error", "why")

    run(body())


def test_an_engine_outlives_the_loop() -> None:
    mailboxes: list[_ChunkQueue] = []

    async def body() -> None:
        mailboxes.append(_ChunkQueue(asyncio.get_running_loop()))

    run(body())
    mailboxes[0].put(TokenChunk((1,)))
