# SPDX-License-Identifier: Apache-2.0
"""What each rank does of rank 0's KV orders. All ranks carry out the same orders in the same order, and come to the same result.

Prefill: keep a copy of a slot. Decode: fetch in the background, and put what came into a slot once every rank has its part.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from dynamo_mpi.engines.reference.agreement import Agreement
from dynamo_mpi.engines.reference.attention import KeyValueCache
from dynamo_mpi.engines.reference.kv_offer import parse_offer
from dynamo_mpi.engines.reference.kv_orders import Abandon, Drop, Keep, Order, Poll, Pull
from dynamo_mpi.engines.reference.kv_pull import DONE, FAILED, PENDING, BackgroundPull
from dynamo_mpi.engines.reference.kv_server import KvServer
from dynamo_mpi.engines.reference.kv_shards import Holding
from dynamo_mpi.engines.reference.kv_store import KvStore, StoreFullError

_LINGER_SECONDS = 3.0
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Settled:
    """A pull that has ended on all ranks.

    Args:
        number: which.
        failures: what went wrong, by rank, on rank 0 alone; all empty when the KV is in its slot.
    """

    number: int
    failures: tuple[str, ...]


class RankHandoff:
    """One rank's part of every hand-off.

    Args:
        rank: its number.
        holding: what its KV cache holds of the model.
        cache: its KV cache.
        agreement: with the other ranks.
        pull_seconds: how long a pull may take.
        store: of a prefill worker.
        server: of a prefill worker, serving ``store``.
    """

    def __init__(
        self,
        rank: int,
        holding: Holding,
        cache: KeyValueCache,
        agreement: Agreement,
        pull_seconds: float,
        store: KvStore | None = None,
        server: KvServer | None = None,
    ) -> None:
        self._rank = rank
        self._holding = holding
        self._cache = cache
        self._agreement = agreement
        self._pull_seconds = pull_seconds
        self._store = store
        self._server = server
        self._pulls: dict[int, tuple[int, BackgroundPull]] = {}

    @property
    def unfetched(self) -> int:
        """Prompts that this rank keeps for decode workers. Thread-safe."""
        return 0 if self._store is None else len(self._store)

    def obey(self, order: Order) -> None:
        """Carry out what rank 0 has ordered."""
        if isinstance(order, Keep):
            self.keep(order)
        elif isinstance(order, Drop):
            self.drop(order)
        elif isinstance(order, Pull):
            self.begin(order)
        elif isinstance(order, Poll):
            self.poll(order)
        else:
            self.abandon(order)

    def keep(self, order: Keep) -> tuple[str, ...]:
        """Copy a slot into the store. Collective.

        Returns:
            What went wrong, by rank, on rank 0; nothing where all ranks have kept it.
        """
        failure = ""
        try:
            if self._store is None:
                raise StoreFullError("this isn't a prefill worker")
            parts = [cached[order.slot, :, :, : order.tokens] for cached in (self._cache.keys, self._cache.values)]
            self._store.keep(order.transfer_id, order.secret, self._holding, parts)
        except (StoreFullError, MemoryError) as error:
            failure = str(error) or type(error).__name__
        if self._agreement.lowest([0 if failure else 1])[0]:
            return ()
        return tuple(self._agreement.texts(failure))

    def drop(self, order: Drop) -> None:
        """Forget what `keep` has kept."""
        if self._store is not None:
            self._store.release(order.transfer_id)

    def begin(self, order: Pull) -> None:
        """Begin to fetch this rank's part."""
        offer = parse_offer(json.loads(order.offer))
        pull = BackgroundPull(offer, self._holding, self._rank, self._pull_seconds)
        self._pulls[order.number] = (order.slot, pull)

    def poll(self, order: Poll) -> list[Settled]:
        """Agree how pulls stand, and end those that are done everywhere or have failed anywhere. Collective."""
        statuses = [self._pulls[number][1].status() for number in order.numbers]
        settled = []
        for number, status in zip(order.numbers, self._agreement.lowest(statuses), strict=True):
            if status == PENDING:
                continue
            slot, pull = self._pulls.pop(number)
            if status == DONE:
                pull.put_into(self._cache, slot)
                settled.append(Settled(number, ()))
            elif status == FAILED:
                pull.abandon()
                settled.append(Settled(number, tuple(self._agreement.texts(pull.failure))))
        return settled

    def abandon(self, order: Abandon) -> None:
        """Forget a pull."""
        _, pull = self._pulls.pop(order.number)
        pull.abandon()

    def linger(self) -> None:
        """Wait a little for decode workers to fetch what they have been offered. Rank 0, before the others are released."""
        end = time.monotonic() + _LINGER_SECONDS
        while self.unfetched and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
