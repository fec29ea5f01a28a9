# SPDX-License-Identifier: Apache-2.0
"""The warmup: one real completion over all ranks before the worker registers."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import EngineError, PhaseTimeoutError
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, TokenChunk

if TYPE_CHECKING:
    from dynamo_mpi.engines.protocol import Engine

_TOKENS = 2  # the second is generated from the KV cache that the first one filled


def run_first_completion(engine: Engine, prompt_token_id: int, timeout: float) -> float:
    """Run one request through a started engine.

    Args:
        engine: started, with nothing in flight.
        prompt_token_id: the prompt, one token.
        timeout: largest duration in seconds.

    Returns:
        The duration in seconds.

    Raises:
        EngineError: the engine refused the request, or ended it without tokens.
        PhaseTimeoutError: the request did not finish in time.
    """
    start = time.monotonic()
    chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
    request = GenerationRequest("dynamo_mpi-proof", (prompt_token_id,), max_tokens=_TOKENS)
    try:
        engine.submit(request, chunks.put)
    except RequestError as error:
        raise EngineError(f"the engine refused the first request: {error}") from None
    generated = 0
    while True:
        try:
            chunk = chunks.get(timeout=max(0.0, start + timeout - time.monotonic()))
        except queue.Empty:
            raise PhaseTimeoutError(
                f"the first completion took more than {timeout:g} s ({generated} of {_TOKENS} tokens came out)",
                fix="look at the ranks' logs; --warmup-timeout gives it longer",
            ) from None
        generated += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            break
    if chunk.finish_reason in ("error", "cancelled") or generated == 0:
        raise EngineError(f"the first completion failed: {chunk.error or chunk.finish_reason}, {generated} tokens")
    return time.monotonic() - start
