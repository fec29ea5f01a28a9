# SPDX-License-Identifier: Apache-2.0
"""Checks an engine's requests before they are queued, and keeps those that are accepted and not finished."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

import numpy as np

from dynamo_mpi.engines.protocol import FinishReason, GenerationRequest, RequestError, TokenCallback, TokenChunk
from dynamo_mpi.engines.reference.kv_descriptor import KvDescriptor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A request's data besides its schedule.

    Args:
        callback: called with its chunks.
        generator: the random generator for its tokens.
        descriptor: the descriptor of its prompt's KV, if another worker has computed it.
    """

    callback: TokenCallback
    generator: np.random.Generator
    descriptor: KvDescriptor | None = None


class InFlight:
    """Requests by their id, each until its last chunk is delivered. Thread-safe; no lock is held while a callback runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[str, Served] = {}

    def __contains__(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._requests

    def __getitem__(self, request_id: str) -> Served:
        with self._lock:
            return self._requests[request_id]

    def add(self, request_id: str, request: Served) -> None:
        """Add a request.

        Raises:
            RequestError: its id is in use.
        """
        with self._lock:
            if request_id in self._requests:
                raise RequestError(f"request id {request_id} is in flight already")
            self._requests[request_id] = request

    def deliver(self, request_id: str, chunk: TokenChunk) -> bool:
        """Pass a chunk to its callback. Return whether the request continues."""
        with self._lock:
            request = self._requests[request_id]
            if chunk.finish_reason is not None:
                del self._requests[request_id]
        try:
            request.callback(chunk)
        except Exception:  # an error of one callback must not end the other requests
            _log.exception("the receiver of request %s failed; the request is dropped", request_id)
            with self._lock:
                if self._requests.get(request_id) is request:
                    del self._requests[request_id]
            return False
        return True

    def end_all(self, reason: FinishReason, error: str | None) -> None:
        """Deliver a last chunk to every request."""
        with self._lock:
            request_ids = list(self._requests)
        for request_id in request_ids:
            self.deliver(request_id, TokenChunk((), reason, error))


def check_request(request: GenerationRequest, *, vocab_size: int, context_length: int) -> None:
    """Check that the engine can serve ``request``.

    Raises:
        RequestError: it can't; the text, for the client, contains the reason and what is allowed.
    """
    _check_lengths(request, context_length)
    for token_id in request.prompt_token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"the prompt holds token id {token_id}; this model's ids are 0 to {vocab_size - 1}")
    if request.keep_kv and request.max_tokens != 1:
        raise RequestError(f"max_tokens is {request.max_tokens}: a prompt's KV is handed over after its first token")
    sampling = request.sampling
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0:
        raise RequestError(f"temperature is {sampling.temperature}: it must be a number of at least 0")
    if not 0 <= sampling.top_p <= 1:
        raise RequestError(f"top_p is {sampling.top_p}: it must be between 0 and 1")


def _check_lengths(request: GenerationRequest, context_length: int) -> None:
    prompt, wanted = len(request.prompt_token_ids), request.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least one token")
    if wanted is not None and wanted < 1:
        raise RequestError(f"max_tokens is {wanted}: it must be at least 1")
    if prompt >= context_length:
        raise RequestError(
            f"the prompt has {prompt} tokens; this engine's context is {context_length} tokens: "
            f"shorten the prompt to at most {context_length - 1}"
        )
    if wanted is not None and prompt + wanted > context_length:
        raise RequestError(
            f"the prompt has {prompt} tokens and {wanted} were asked for; this engine's context is {context_length} "
            f"tokens: shorten the prompt or ask for at most {context_length - prompt}"
        )
    if wanted is not None and request.min_tokens > wanted:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than max_tokens, which is {wanted}")
