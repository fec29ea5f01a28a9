# SPDX-License-Identifier: Apache-2.0
"""One rank's fetching of one prompt's KV, in a thread: the engine's steps go on meanwhile.

What comes is kept beside the KV cache until all ranks agree that they have theirs: a slot may have been given to somebody else before a
late peer answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dynamo_mpi.engines.reference.attention import KeyValueCache
from dynamo_mpi.engines.reference.kv_client import FetchError, fetch
from dynamo_mpi.engines.reference.kv_offer import Offer
from dynamo_mpi.engines.reference.kv_shards import Holding, Piece, pieces_of
from dynamo_mpi.engines.reference.kv_socket import Deadline
from dynamo_mpi.engines.reference.weights import Float32Array

FAILED, PENDING, DONE = 0, 1, 2
"""How a pull stands; the lowest over all ranks is how it stands for the engine."""

_GRACE_SECONDS = 1.0


class BackgroundPull:
    """Begins with its construction; never raises: what goes wrong is its status.

    Args:
        offer: what is there.
        need: what this rank holds.
        rank: this rank's number.
        seconds: for all of it.
    """

    def __init__(self, offer: Offer, need: Holding, rank: int, seconds: float) -> None:
        self._offer = offer
        self._need = need
        self._deadline = Deadline.after(seconds)
        self._seconds = seconds
        self._abandoned = threading.Event()
        self._fetched: Sequence[tuple[Piece, Float32Array]] | None = None
        self._failure = ""
        thread = threading.Thread(target=self._run, args=(rank,), name="kv-pull", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads on this host
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
        """Why it failed; empty otherwise."""
        return self._failure

    def put_into(self, cache: KeyValueCache, slot: int) -> None:
        """Write what was fetched to the slot's first positions; only once it is DONE."""
        for piece, values in self._fetched or ():
            layers = _within(piece.layers, self._need.layers)
            heads = _within(piece.heads, self._need.heads)
            tokens = values.shape[3]
            cache.keys[slot, layers, heads, :tokens] = values[0]
            cache.values[slot, layers, heads, :tokens] = values[1]

    def abandon(self) -> None:
        """Fetch nothing more; what is under way ends by its deadline, and goes nowhere."""
        self._abandoned.set()

    def _run(self, rank: int) -> None:
        try:
            fetched = []
            for piece in pieces_of(self._need, [holder.holding for holder in self._offer.holders], rank):
                if self._abandoned.is_set():
                    return
                fetched.append((piece, fetch(self._offer, piece, self._deadline)))
            self._fetched = fetched
        except (FetchError, ValueError) as error:
            self._failure = str(error) or type(error).__name__
        except Exception as error:  # of this request alone, whatever it is
            self._failure = f"{type(error).__name__}: {error}"


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
