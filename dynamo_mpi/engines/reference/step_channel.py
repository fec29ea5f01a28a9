# SPDX-License-Identifier: Apache-2.0
"""How rank 0 tells the other ranks what to do, and how they wait for it without burning a core.

MPI's own waits spin: a rank in a blocking broadcast takes a whole core, which on CPUs the other ranks need. Followers
start a non-blocking broadcast instead and look at it now and then: at once while steps follow each other, and after
ever longer sleeps when none comes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from dynamo_mpi.engines.reference.kv_orders import Order, decode_order, encode_order
from dynamo_mpi.engines.reference.step_plan import Int64Array, StepPlan, decode, encode

if TYPE_CHECKING:
    from mpi4py import MPI

_STEP, _STOP, _ORDER = 1, 2, 3
_HEADER_WORDS = 2
_INLINE_WORDS = 254
"""Words that travel with the header: enough for a step of 50 sequences, and within MPI's eager limits."""

_SPIN_SECONDS = 0.002
_FIRST_SLEEP_SECONDS = 0.00005
_LONGEST_SLEEP_SECONDS = 0.004
_SLEEP_SHARE = 0.05
"""A sleep lasts this share of the time waited so far: what it adds to a wait stays in proportion."""


def sleep_seconds(waited: float) -> float:
    """Return how long a follower sleeps before it looks again, after ``waited`` seconds without a step."""
    if waited < _SPIN_SECONDS:
        return 0.0
    return min(max(_FIRST_SLEEP_SECONDS, waited * _SLEEP_SHARE), _LONGEST_SLEEP_SECONDS)


class StepChannel:
    """From rank 0 to all others, over a communicator whose collectives all ranks call in the same order.

    Args:
        communicator: of all ranks of the engine.
    """

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._message: Int64Array = np.zeros(_HEADER_WORDS + _INLINE_WORDS, np.int64)

    def send_step(self, plan: StepPlan) -> None:
        """Rank 0: have all ranks run ``plan``."""
        self._send(_STEP, encode(plan))

    def send_order(self, order: Order) -> None:
        """Rank 0: have all ranks carry out ``order``."""
        self._send(_ORDER, encode_order(order))

    def send_stop(self) -> None:
        """Rank 0: release all ranks."""
        self._send(_STOP, np.empty(0, np.int64))

    def receive(self) -> StepPlan | Order | None:
        """Other ranks: wait for the next plan or order; None when rank 0 has stopped."""
        request = self._communicator.Ibcast(self._message, root=0)
        began = time.monotonic()
        while not request.Test():
            time.sleep(sleep_seconds(time.monotonic() - began))
        kind, size = self._message[:_HEADER_WORDS].tolist()
        if kind == _STOP:
            return None
        words = self._message[_HEADER_WORDS : _HEADER_WORDS + size]
        if size > _INLINE_WORDS:
            words = np.empty(size, np.int64)
            self._communicator.Bcast(words, root=0)
        return decode_order(words) if kind == _ORDER else decode(words)

    def _send(self, kind: int, words: Int64Array) -> None:
        self._message[:_HEADER_WORDS] = kind, words.size
        fits = words.size <= _INLINE_WORDS
        if fits:
            self._message[_HEADER_WORDS : _HEADER_WORDS + words.size] = words
        self._communicator.Ibcast(self._message, root=0).Wait()
        if not fits:
            self._communicator.Bcast(words, root=0)
