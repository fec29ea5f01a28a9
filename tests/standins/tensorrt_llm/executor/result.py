# SPDX-License-Identifier: Apache-2.0
"""What comes back of a request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from tensorrt_llm._environment import fault
from tensorrt_llm.disaggregated_params import DisaggregatedParams, offered

from .utils import RequestError


@dataclass
class Logprob:
    """As the real one has it; the stand-in makes none but those of the fault ``nan``."""

    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    """One continuation; ``token_ids`` holds all of it so far."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None


class GenerationResult:
    """A request in flight: ``async for`` yields this same object each time there is more.

    A token that ends the request is not part of the output unless it was asked for, as in the real one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        streaming: bool,
        keep_stop: bool,
        cancel: Callable[[str], None],
        asked: DisaggregatedParams | None = None,
    ) -> None:
        self.request_id = int(request.request_id)
        self.prompt: str | None = None
        self.prompt_token_ids = list(request.prompt_token_ids)
        self.outputs = [CompletionOutput()]
        self.finished = False
        self.error: str | None = None
        self.context_logits: Any = None
        self.disaggregated_params: Any = None
        self._asked = asked
        self.cached_tokens = 0
        self.metrics_dict: dict[str, Any] = {}
        self._stops = request.stop_token_ids
        self._streaming, self._keep_stop, self._cancel = streaming, keep_stop, cancel
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()

    def receive(self, chunk: TokenChunk) -> None:
        """Take a chunk, in whatever thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

    def abort(self) -> None:
        """End it soon, with finish_reason ``cancelled``."""
        self._cancel(str(self.request_id))

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self.finished:
            raise StopAsyncIteration
        self._apply(await self._chunks.get())
        while not (self.finished or self._streaming):
            self._apply(await self._chunks.get())
        return self

    def _apply(self, chunk: TokenChunk) -> None:
        output = self.outputs[0]
        new = list(chunk.token_ids)
        if chunk.finish_reason == "stop" and new and new[-1] in self._stops:
            output.stop_reason = new[-1]
            if not self._keep_stop:
                new.pop()
        output.token_ids = output.token_ids + new
        if fault("nan") is not None:
            output.logprobs = [{token: Logprob(math.nan, 1)} for token in output.token_ids]
        output.disaggregated_params = offered(chunk, self.request_id, output.token_ids, self._asked)
        output.finish_reason = chunk.finish_reason
        self.finished = chunk.finish_reason is not None
        if chunk.finish_reason == "error":
            self.error = chunk.error
            raise RequestError(chunk.error)
