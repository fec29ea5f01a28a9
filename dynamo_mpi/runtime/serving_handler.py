# SPDX-License-Identifier: Apache-2.0
"""The endpoint's handler: one Dynamo request in, a stream of token chunks out; and what errors of the Dynamo runtime mean.

The handler has two forms. *Push*: runtimes from 1.5 on pass a ``response_sender``, and each chunk is passed to Rust while the GIL is held
anyway. *Pull*: older runtimes, and health checks in newer ones, iterate the generator. The runtime chooses by the parameter's name in the
signature.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, DynamoMpiError, EngineError, UsageError
from dynamo_mpi.engines.protocol import RequestError, TokenChunk
from dynamo_mpi.engines.requests import for_role, to_generation_request, to_response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from dynamo_mpi.engines.protocol import Engine


def runtime_error(error: BaseException) -> DynamoMpiError:
    """Return the `DynamoMpiError` for an error of the runtime."""
    text = " ".join(str(error).split())
    if "environment variable" in text:
        return UsageError(
            f"the Dynamo runtime can't read its environment: {text}",
            expected="variables as Dynamo documents them",
            fix="correct that DYN_* variable",
        )
    if "address already in use" in text.lower():
        return UsageError(
            f"the Dynamo runtime can't bind its port: {text}",
            expected="a free port on this node",
            fix="free it, or choose another (DYN_TCP_RPC_PORT, DYN_SYSTEM_PORT)",
        )
    if any(
        word in text.lower()
        for word in (
            "user name is empty",
            "authentication failed",
            "permission denied",
            "invalid auth",
            "authorization violation",
        )
    ):
        return AuthorizationError(
            f"the Dynamo runtime was refused: {text}",
            expected="credentials that etcd (and NATS, if it is used) accept",
            fix="correct ETCD_AUTH_* or NATS_AUTH_*",
        )
    return DiscoveryError(
        f"the Dynamo runtime could not register the worker: {text}",
        expected="etcd (and NATS, if it is used) must answer and accept the credentials",
        fix="check etcd; the runtime uses ETCD_ENDPOINTS and ETCD_AUTH_*",
    )


@dataclass(frozen=True)
class RuntimeErrors:
    """The exceptions of the Dynamo runtime.

    Args:
        invalid_argument: reported as a client's error.
        engine_shutdown: the frontend retries on another worker, and sends this one no requests for a while.
        request_failed: this request alone has failed; the worker keeps serving.
    """

    invalid_argument: Callable[[str], Exception]
    engine_shutdown: Callable[[str], Exception]
    request_failed: Callable[[str], Exception]


class RequestHandler:
    """Serves requests with an engine and counts those in flight.

    Args:
        engine: a started engine.
        errors: the runtime's exceptions.
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.
        on_in_flight: called with the number of requests in flight when it changes; it must be quick.
    """

    def __init__(
        self,
        engine: Engine,
        errors: RuntimeErrors,
        role: str = "agg",
        on_in_flight: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._on_in_flight = on_in_flight
        self._errors = errors
        self._role = role
        self._request_ids: set[str] = set()
        self._cut_off = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._request_ids)

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until no request is in flight, at most ``timeout`` seconds; return whether none is."""
        if self._idle.is_set():
            return True  # even if the timeout is 0
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def cut_off_all(self) -> None:
        """End every request in flight with an error, which the frontend passes on; with DYN_MIGRATION_LIMIT it may retry on another worker.

        Dynamo's frontend makes ``"stop"`` of the finish reason ``"cancelled"``: the client would take a part of an answer for all of it.
        """
        self._cut_off = True
        for request_id in self._request_ids:
            self._engine.cancel(request_id)

    def generate(self, request: Any, context: Any, response_sender: Any = None) -> AsyncGenerator[dict[str, Any], None]:
        """Serve one request; the runtime calls this.

        Returns:
            An async generator: of responses, or, with a ``response_sender``, one that yields nothing and pushes them there.
        """
        stream = self._stream(request, context)
        return stream if response_sender is None else _push(stream, response_sender)

    async def _stream(self, request: Any, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        chunks = _ChunkQueue(asyncio.get_running_loop())
        request_id = context.id()
        try:
            generation = for_role(to_generation_request(request_id, request), request, self._role)
            self._engine.submit(generation, chunks.put)
        except RequestError as error:
            raise self._errors.invalid_argument(str(error)) from None
        except EngineError as error:
            raise self._errors.engine_shutdown(error.problem) from None
        self._request_ids.add(request_id)
        self._idle.clear()
        self._on_in_flight(self.in_flight)
        stopped = asyncio.ensure_future(context.async_killed_or_stopped())
        # not if it is cancelled below: a retry with the same id may be in flight by then
        stopped.add_done_callback(lambda ended: None if ended.cancelled() else self._engine.cancel(request_id))
        generated, finished = 0, False
        try:
            while not finished:
                chunk = await chunks.get()
                generated += len(chunk.token_ids)
                finished = chunk.finish_reason is not None
                if chunk.finish_reason == "error":
                    kind = self._errors.engine_shutdown if chunk.engine_failed else self._errors.request_failed
                    raise kind(chunk.error or "the engine failed")
                if chunk.finish_reason == "cancelled" and self._cut_off and not stopped.done():
                    raise self._errors.engine_shutdown("the worker has ended before the answer was complete")
                yield to_response(chunk, len(generation.prompt_token_ids), generated)
        finally:
            if not finished:
                self._engine.cancel(request_id)
            stopped.cancel()
            self._request_ids.discard(request_id)
            if not self._request_ids:
                self._idle.set()
            self._on_in_flight(self.in_flight)


async def _push(stream: AsyncGenerator[dict[str, Any], None], sender: Any) -> AsyncGenerator[dict[str, Any], None]:
    """Drain ``stream`` into ``sender``. Errors are left to the runtime, which distinguishes them by type."""
    # closed explicitly: a sender that raises must not leave the request running
    async with contextlib.aclosing(stream):
        async for response in stream:
            sender.send(response)
    sender.close()
    nothing: tuple[dict[str, Any], ...] = ()
    for response in nothing:
        yield response  # makes this an async generator, the only form that the runtime drives


class _ChunkQueue:
    """A queue of chunks from the engine's thread to one coroutine, which gets all queued chunks as one.

    A deque needs no lock for one reader and one writer. The writer wakes the reader if its chunk is the only one, so each chunk is either
    announced or read together with an announced one; a spurious wake-up is possible and harmless.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: deque[TokenChunk] = deque()
        self._arrived = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        """Add a chunk; called from the engine's thread."""
        self._chunks.append(chunk)
        if len(self._chunks) == 1:
            # the loop may be closed, and with it the reader
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> TokenChunk:
        """Return everything since the last call as one chunk, waiting for the first."""
        chunks: list[TokenChunk] = []
        while not chunks:
            await self._arrived.wait()
            self._arrived.clear()
            while self._chunks:
                chunks.append(self._chunks.popleft())
        if len(chunks) == 1:
            return chunks[0]
        tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
        return replace(chunks[-1], token_ids=tokens)
