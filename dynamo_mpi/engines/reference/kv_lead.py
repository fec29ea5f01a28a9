# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of hand-offs: makes offers for what all ranks have kept, and sees to it that all ranks fetch what was offered.

Everything here runs in the engine's thread, but for the farewell to the prefill ranks, which no request has to wait for.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.kv_client import release
from dynamo_mpi.engines.reference.kv_offer import (
    CacheLayout,
    Holder,
    Offer,
    OfferError,
    check_offer,
    digest_of,
    parse_offer,
)
from dynamo_mpi.engines.reference.kv_orders import Abandon, Drop, Keep, Order, Poll, Pull
from dynamo_mpi.engines.reference.kv_rank import RankHandoff
from dynamo_mpi.engines.reference.kv_socket import Deadline
from dynamo_mpi.engines.reference.kv_wire import SECRET_BYTES, TRANSFER_ID_BYTES
from dynamo_mpi.errors import EngineError

_log = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS = 0.0005
_LONGEST_PAUSE_SECONDS = 0.01
_PAUSE_SHARE = 0.1


@dataclass(frozen=True)
class Prefilled:
    """A request whose KV is in its slot on all ranks, or will never be.

    Args:
        request_id: whose.
        first_token: that prefill has chosen.
        seconds: that fetching took.
        error: why there is no KV; empty when there is.
    """

    request_id: str
    first_token: int
    seconds: float
    error: str


@dataclass(frozen=True)
class _Pulling:
    request_id: str
    offer: Offer
    began: float


class LeadHandoff:
    """All hand-offs of one engine.

    Args:
        order: has all other ranks carry out an order.
        ranks: rank 0's own part in it.
        layout: of this engine's KV.
        holders: where this engine's ranks serve theirs; empty but for prefill workers.
        sizes: this engine's tensor- and pipeline-parallel size.
        pull_seconds: how long a pull may take.
    """

    def __init__(
        self,
        order: Callable[[Order], None],
        ranks: RankHandoff,
        layout: CacheLayout,
        holders: tuple[Holder, ...],
        sizes: tuple[int, int],
        pull_seconds: float,
    ) -> None:
        self._order = order
        self._ranks = ranks
        self._layout = layout
        self._holders = holders
        self._sizes = sizes
        self._pull_seconds = pull_seconds
        self._numbers = itertools.count()
        self._pulling: dict[int, _Pulling] = {}

    def accept(self, request: GenerationRequest, vocab_size: int) -> Offer | None:
        """Return the offer that a request brings, checked; None if it brings none. Thread-safe.

        Raises:
            EngineError: this engine can't go on from it, or is asked for one and can't make any.
        """
        if request.offer_kv and not self._holders:
            raise EngineError("this engine serves no KV", needed="a prefill worker", fix="start it with --role prefill")
        if request.kv_offer is None:
            return None
        try:
            offer = parse_offer(request.kv_offer)
            check_offer(offer, self._layout, request.prompt_token_ids, vocab_size)
        except OfferError as error:
            raise EngineError(str(error)) from None
        return offer

    def with_offer(self, request: GenerationRequest, slot: int, chunk: TokenChunk) -> TokenChunk:
        """Return a request's last chunk with the offer of its prompt's KV, or the error for which there is none."""
        try:
            offer = self._offer(request, slot, chunk.token_ids[-1])
        except EngineError as error:
            return TokenChunk((), "error", error.found)
        return replace(chunk, kv_offer=offer.to_json())

    def _offer(self, request: GenerationRequest, slot: int, first_token: int) -> Offer:
        """Keep the KV of a request's prompt on all ranks, and return where it is.

        Raises:
            EngineError: a rank could not keep its part.
        """
        prompt = request.prompt_token_ids
        transfer_id, secret = secrets.token_bytes(TRANSFER_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        keep = Keep(slot, len(prompt), transfer_id, secret)
        self._order(keep)
        if failures := self._ranks.keep(keep):
            self._have_all(Drop(transfer_id))
            raise EngineError(f"the prompt's KV could not be kept for decode: {_first(failures)}")
        tp_size, pp_size = self._sizes
        return Offer(
            transfer_id=transfer_id,
            secret=secret,
            layout=self._layout,
            tp_size=tp_size,
            pp_size=pp_size,
            prompt_tokens=len(prompt),
            prompt_digest=digest_of(prompt),
            first_token=first_token,
            holders=self._holders,
        )

    def begin(self, request_id: str, slot: int, offer: Offer) -> None:
        """Have all ranks begin to fetch."""
        number = next(self._numbers)
        self._have_all(Pull(number, slot, json.dumps(offer.to_json()).encode()))
        self._pulling[number] = _Pulling(request_id, offer, time.monotonic())

    def poll(self) -> list[Prefilled]:
        """Return the requests whose fetching has ended since the last call."""
        if not self._pulling:
            return []
        poll = Poll(tuple(self._pulling))
        self._order(poll)
        ended = []
        for settled in self._ranks.poll(poll):
            pulling = self._pulling.pop(settled.number)
            self._say_farewell(pulling.offer)
            error = f"the prompt's KV could not be fetched: {_first(settled.failures)}" if settled.failures else ""
            seconds = time.monotonic() - pulling.began
            if error:
                _log.warning("request %s: %s", pulling.request_id, error)
            ended.append(Prefilled(pulling.request_id, pulling.offer.first_token, seconds, error))
        return ended

    def cancel(self, request_id: str) -> None:
        """Have all ranks forget a request's fetching, if there is any."""
        for number in [number for number, pulling in self._pulling.items() if pulling.request_id == request_id]:
            self._have_all(Abandon(number))
            self._say_farewell(self._pulling.pop(number).offer)

    def pause_seconds(self) -> float:
        """Return how long to sleep before the next poll: short at first, in proportion to the wait so far later."""
        waited = time.monotonic() - max((pulling.began for pulling in self._pulling.values()), default=0.0)
        return min(max(_FIRST_PAUSE_SECONDS, waited * _PAUSE_SHARE), _LONGEST_PAUSE_SECONDS)

    def _have_all(self, order: Drop | Pull | Abandon) -> None:
        self._order(order)
        self._ranks.obey(order)

    def _say_farewell(self, offer: Offer) -> None:
        try:
            threading.Thread(target=self._release, args=(offer,), name="kv-release", daemon=True).start()
        except RuntimeError as error:  # no more threads on this host: the offer expires
            _log.warning("KV was not released at the prefill worker: %s", error)

    def _release(self, offer: Offer) -> None:
        for failure in release(offer, Deadline.after(self._pull_seconds)):
            _log.info("KV was not released: %s", failure)


def _first(failures: tuple[str, ...]) -> str:
    rank, text = next((rank, text) for rank, text in enumerate(failures) if text)
    return f"rank {rank}: {text}"
