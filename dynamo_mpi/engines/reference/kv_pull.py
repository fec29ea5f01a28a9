# SPDX-License-Identifier: Apache-2.0
"""A pull of one prompt's KV in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dynamo_mpi.engines.reference.attention import KeyValueCache
from dynamo_mpi.engines.reference.kv_client import FetchError, fetch
from dynamo_mpi.engines.reference.kv_descriptor import KvDescriptor, KvShard, ShardSlice, slices_of
from dynamo_mpi.engines.reference.kv_wire import Deadline
from dynamo_mpi.engines.reference.weights import Float32Array

FAILED, PENDING, DONE = 0, 1, 2
"""The status of a pull; the engine uses the lowest of all ranks."""

_GRACE_SECONDS = 1.0


class BackgroundPull:
    """One rank's pull of one prompt's KV. Starts when it is created. Errors set its status and are not raised.

    Args:
        descriptor: the KV's descriptor.
        need: this rank's shard.
        rank: this rank's number.
        seconds: the time limit.
    """

    def __init__(self, descriptor: KvDescriptor, need: KvShard, rank: int, seconds: float) -> None:
        self._descriptor = descriptor
        self._need = need
        self._deadline = Deadline.after(seconds)
        self._seconds = seconds
        self._abandoned = threading.Event()
        self._fetched: Sequence[tuple[ShardSlice, Float32Array]] | None = None
        self._failure = ""
        thread = threading.Thread(target=self._run, args=(rank,), name="kv-pull", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # thread limit reached
            self._failure = str(error)

    def status(self) -> int:
        """Return FAILED, PENDING or DONE."""
        if self._failure:
            return FAILED
        if self._fetched is not None:
            return DONE
        if time.monotonic() > self._deadline.moment + _GRACE_SECONDS:
            self._failure = f"no answer within {self._seconds:g} s"
            return FAILED
        return PENDING

    @property
    def failure(self) -> str:
        """The error if it failed; otherwise empty."""
        return self._failure

    def put_into(self, cache: KeyValueCache, slot: int) -> None:
        """Write the fetched KV to the slot's first positions; only if the status is DONE."""
        for part, values in self._fetched or ():
            layers = _within(part.layers, self._need.layers)
            heads = _within(part.heads, self._need.heads)
            tokens = values.shape[3]
            cache.keys[slot, layers, heads, :tokens] = values[0]
            cache.values[slot, layers, heads, :tokens] = values[1]

    def abandon(self) -> None:
        """Stop fetching; a request in progress ends by its deadline and is dropped."""
        self._abandoned.set()

    def _run(self, rank: int) -> None:
        try:
            fetched = []
            for part in slices_of(self._need, [there.shard for there in self._descriptor.ranks], rank):
                if self._abandoned.is_set():
                    return
                fetched.append((part, fetch(self._descriptor, part, self._deadline)))
            self._fetched = fetched
        except (FetchError, ValueError) as error:
            self._failure = str(error) or type(error).__name__
        except Exception as error:  # any error fails this request only
            self._failure = f"{type(error).__name__}: {error}"


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
