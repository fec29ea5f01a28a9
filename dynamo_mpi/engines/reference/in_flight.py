# SPDX-License-Identifier: Apache-2.0
"""The requests that an engine has accepted and not ended yet, and how chunks get to those who sent them."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import numpy as np

from dynamo_mpi.engines.protocol import FinishReason, RequestError, Sink, TokenChunk
from dynamo_mpi.engines.reference.kv_offer import Offer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What an engine keeps of a request beside its schedule.

    Args:
        sink: where its chunks go.
        generator: that chooses its tokens.
        offer: of its prompt's KV, if another worker has made it.
    """

    sink: Sink
    generator: np.random.Generator
    offer: Offer | None = None


class InFlight:
    """Requests by their id, each until its last chunk is delivered. Thread-safe; no lock is held while a sink runs."""

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
        """Begin to serve a request.

        Raises:
            RequestError: its id is in use.
        """
        with self._lock:
            if request_id in self._requests:
                raise RequestError(f"request id {request_id} is in flight already")
            self._requests[request_id] = request

    def deliver(self, request_id: str, chunk: TokenChunk) -> bool:
        """Hand a chunk to its sink. Returns whether the request goes on to be served."""
        with self._lock:
            request = self._requests[request_id]
            if chunk.finish_reason is not None:
                del self._requests[request_id]
        try:
            request.sink(chunk)
        except Exception:  # a sink is its caller's code; its error must not end the other requests
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
