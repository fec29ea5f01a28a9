# SPDX-License-Identifier: Apache-2.0
"""A small engine for tests of what stands around one: its tokens come from a thread, when the test asks for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from dynamo_mpi.engines.protocol import EngineLimits, GenerationRequest, RequestError, TokenCallback, TokenChunk

Script = Callable[[GenerationRequest], Iterable[TokenChunk]]


def count_up(request: GenerationRequest) -> Iterable[TokenChunk]:
    """Make the tokens 0, 1, 2 …, one a chunk, until max_tokens."""
    most = request.max_tokens or 4
    for token in range(most):
        yield TokenChunk((token,), "length" if token == most - 1 else None)


class ScriptedEngine:
    """Runs one request at a time, in a thread; keeps the protocol's promises about ``callback`` and ``cancel``.

    Args:
        script: what a request gets.
    """

    limits = EngineLimits(64, 8, 64, 16, 128)
    pending_kv_transfers = 0

    def __init__(self, script: Script = count_up) -> None:
        self._script = script
        self._queue: queue.SimpleQueue[tuple[GenerationRequest, TokenCallback] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._wanted: set[str] = set()
        self.cancelled: list[str] = []
        self.refusal: Exception | None = None

    def __enter__(self) -> ScriptedEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None: ...

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        if self.refusal is not None:
            raise self.refusal
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty")
        self._wanted.add(request.request_id)
        self._queue.put((request, callback))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._wanted.discard(request_id)

    def on_failure(self, callback: Callable[[BaseException], None]) -> None: ...

    def close(self) -> None:
        self._wanted.clear()
        self._queue.put(None)
        self._thread.join()

    def follow(self) -> None: ...

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            request, callback = entry
            for chunk in self._script(request):
                if request.request_id not in self._wanted:
                    callback(TokenChunk((), "cancelled"))
                    break
                callback(chunk)
