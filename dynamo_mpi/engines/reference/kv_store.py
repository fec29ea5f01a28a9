# SPDX-License-Identifier: Apache-2.0
"""What one prefill rank keeps for decode workers to fetch: copies, so that a slot of the KV cache is free at once.

A copy goes when decode releases it, or when nobody has done so in time. What a server thread is sending just then stays whole: it holds
the copy itself, which nobody writes to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynamo_mpi.engines.reference.kv_shards import Holding
from dynamo_mpi.engines.reference.weights import Float32Array


class StoreFullError(Exception):
    """As much as the store may hold waits to be fetched."""


@dataclass(frozen=True)
class Kept:
    """KV of one prompt on one rank.

    Args:
        secret: whoever fetches has to know it.
        holding: which layers and heads of the model these are.
        values: ``[2, layers, heads, tokens, head_dim]``, keys first.
        expires: by the store's clock.
    """

    secret: bytes
    holding: Holding
    values: Float32Array
    expires: float

    @property
    def tokens(self) -> int:
        count: int = self.values.shape[3]
        return count


class KvStore:
    """Transfers by their id. Thread-safe.

    Args:
        most_tokens: kept at a time.
        keep_seconds: how long one waits to be fetched.
        clock: monotonic seconds.
    """

    def __init__(self, most_tokens: int, keep_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_tokens = most_tokens
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[bytes, Kept] = {}

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._kept)

    def keep(self, transfer_id: bytes, secret: bytes, holding: Holding, halves: Sequence[Float32Array]) -> None:
        """Keep a copy. One thread does.

        Args:
            transfer_id: to find it by.
            secret: to be known by whoever fetches it.
            holding: which layers and heads of the model these are.
            halves: keys and values, each ``[layers, heads, tokens, head_dim]``.

        Raises:
            StoreFullError: there is no room.
        """
        tokens = halves[0].shape[2]
        with self._lock:
            self._expire()
            waiting = sum(other.tokens for other in self._kept.values())
            if waiting + tokens > self.most_tokens:
                raise StoreFullError(
                    f"the KV of {len(self._kept)} prompts, {waiting} tokens, waits for decode workers; "
                    f"there is room for {self.most_tokens} tokens"
                )
        values = np.stack(halves)
        with self._lock:
            self._kept[transfer_id] = Kept(secret, holding, values, self._clock() + self._keep_seconds)

    def find(self, transfer_id: bytes) -> Kept | None:
        """Return what is kept under ``transfer_id``, None if nothing is or its time is over."""
        with self._lock:
            self._expire()
            return self._kept.get(transfer_id)

    def release(self, transfer_id: bytes) -> None:
        """Forget it; unknown ids are ignored."""
        with self._lock:
            self._kept.pop(transfer_id, None)

    def expire(self) -> None:
        """Forget what nobody has fetched in time."""
        with self._lock:
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        for transfer_id in [name for name, kept in self._kept.items() if kept.expires <= now]:
            del self._kept[transfer_id]
