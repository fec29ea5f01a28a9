# SPDX-License-Identifier: Apache-2.0
"""Transfers prompts' KV between engines: rank 0 schedules, every rank executes the same commands in the same order.

Prefill: every rank stores a copy of a slot, and rank 0 creates the descriptor. Decode: every rank fetches its part in a thread, while the
engine's steps continue. Fetched KV is kept outside the KV cache until all ranks have their parts, because the slot may be assigned to another
request before a slow peer answers.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.attention import KeyValueCache
from dynamo_mpi.engines.reference.collectives import Consensus
from dynamo_mpi.engines.reference.kv_client import DONE, PENDING, BackgroundPull, release
from dynamo_mpi.engines.reference.kv_descriptor import (
    CacheLayout,
    DescriptorError,
    KvDescriptor,
    KvShard,
    RankShard,
    check_descriptor,
    digest_of,
    parse_descriptor,
)
from dynamo_mpi.engines.reference.kv_server import KvServer, StoreFullError
from dynamo_mpi.engines.reference.kv_wire import SECRET_BYTES, TRANSFER_ID_BYTES, Deadline
from dynamo_mpi.engines.reference.steps import Abandon, Command, Drop, Keep, Poll, Pull

_log = logging.getLogger(__name__)
_READERS_SECONDS = 3.0
_LOOK_SECONDS = 0.02
_FIRST_PAUSE_SECONDS = 0.0005
_LONGEST_PAUSE_SECONDS = 0.01
_PAUSE_SHARE = 0.1


@dataclass(frozen=True)
class Settled:
    """A pull that has ended on all ranks.

    Args:
        number: the pull's number.
        failures: errors by rank, on rank 0 only; empty if the KV is in its slot.
    """

    number: int
    failures: tuple[str, ...]


class KvTransferWorker:
    """One rank's part of every transfer.

    Args:
        rank: this rank's number.
        shard: this rank's shard.
        cache: this rank's KV cache.
        consensus: agreement with the other ranks.
        pull_seconds: how long a pull may take.
        server: a prefill worker's server.
    """

    def __init__(
        self,
        rank: int,
        shard: KvShard,
        cache: KeyValueCache,
        consensus: Consensus,
        pull_seconds: float,
        server: KvServer | None = None,
    ) -> None:
        self._rank = rank
        self._shard = shard
        self._cache = cache
        self._consensus = consensus
        self._pull_seconds = pull_seconds
        self._store = None if server is None else server.store
        self._server = server
        self._pulls: dict[int, tuple[int, BackgroundPull]] = {}

    @property
    def pending_kv_transfers(self) -> int:
        """The number of prompts whose KV this rank stores for decode workers. Thread-safe."""
        return 0 if self._store is None else len(self._store)

    def run(self, command: Command) -> None:
        """Execute a command of rank 0."""
        if isinstance(command, Keep):
            self.keep(command)
        elif isinstance(command, Poll):
            self.poll(command)
        elif isinstance(command, Pull):
            descriptor = parse_descriptor(command.descriptor)
            pull = BackgroundPull(descriptor, self._shard, self._rank, self._pull_seconds)
            self._pulls[command.number] = (command.slot, pull)
        elif isinstance(command, Abandon):
            self._pulls.pop(command.number)[1].abandon()
        elif self._store is not None:
            self._store.release(command.transfer_id)

    def keep(self, command: Keep) -> tuple[str, ...]:
        """Copy a slot into the store. Collective.

        Returns:
            Errors by rank, on rank 0; empty if all ranks have stored it.
        """
        failure = ""
        try:
            if self._store is None:
                raise StoreFullError("this isn't a prefill worker")
            halves = [cached[command.slot, :, :, : command.tokens] for cached in (self._cache.keys, self._cache.values)]
            self._store.keep(command.transfer_id, command.secret, self._shard, halves)
        except (StoreFullError, MemoryError) as error:
            failure = str(error) or type(error).__name__
        if self._consensus.lowest([0 if failure else 1])[0]:
            return ()
        return tuple(self._consensus.texts(failure))

    def poll(self, command: Poll) -> list[Settled]:
        """Agree on the status of pulls, and finish those that are done on all ranks or have failed on any. Collective."""
        statuses = [self._pulls[number][1].status() for number in command.numbers]
        settled = []
        for number, status in zip(command.numbers, self._consensus.lowest(statuses), strict=True):
            if status == PENDING:
                continue
            slot, pull = self._pulls.pop(number)
            if status == DONE:
                pull.put_into(self._cache, slot)
                settled.append(Settled(number, ()))
            else:
                pull.abandon()
                settled.append(Settled(number, tuple(self._consensus.texts(pull.failure))))
        return settled

    def wait_for_readers(self) -> None:
        """Wait up to 3 s until decode workers have fetched the stored KV. On rank 0, before the others are released."""
        end = time.monotonic() + _READERS_SECONDS
        while self.pending_kv_transfers and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()


@dataclass(frozen=True)
class Prefilled:
    """A request whose KV is in its slot on all ranks, or whose pull has failed.

    Args:
        request_id: the request's id.
        first_token: the token that prefill has generated.
        seconds: duration of the pull.
        error: why the pull failed; empty if it didn't.
    """

    request_id: str
    first_token: int
    seconds: float
    error: str


@dataclass(frozen=True)
class _Pulling:
    request_id: str
    descriptor: KvDescriptor
    began: float


class KvTransferScheduler:
    """Rank 0's side of all transfers of one engine. Runs in the engine's thread, except `accept` and the releases.

    Args:
        send: sends a command to all other ranks.
        worker: rank 0's worker.
        layout: this engine's KV layout.
        ranks: the KV servers of this engine's ranks; empty except for prefill workers.
        sizes: this engine's tensor- and pipeline-parallel size.
        pull_seconds: how long a pull may take.
    """

    def __init__(
        self,
        send: Callable[[Command], None],
        worker: KvTransferWorker,
        layout: CacheLayout,
        ranks: tuple[RankShard, ...],
        sizes: tuple[int, int],
        pull_seconds: float,
    ) -> None:
        self._send = send
        self._worker = worker
        self._layout = layout
        self._rank_shards = ranks
        self._sizes = sizes
        self._pull_seconds = pull_seconds
        self._numbers = itertools.count()
        self._pulling: dict[int, _Pulling] = {}

    def accept(self, request: GenerationRequest, vocab_size: int) -> KvDescriptor | None:
        """Return a request's descriptor after checking it; None if it has none. Thread-safe.

        Raises:
            EngineError: this engine can't continue from it, or the request requires a prefill worker.
        """
        if request.keep_kv and not self._rank_shards:
            raise EngineError(
                "this engine serves no KV", expected="a prefill worker", fix="start it with --role prefill"
            )
        if request.kv_transfer_params is None:
            return None
        try:
            descriptor = parse_descriptor(request.kv_transfer_params)
            check_descriptor(descriptor, self._layout, request.prompt_token_ids, vocab_size)
        except DescriptorError as error:
            raise EngineError(str(error)) from None
        return descriptor

    def with_descriptor(self, request: GenerationRequest, slot: int, chunk: TokenChunk) -> TokenChunk:
        """Store the KV of a request's prompt on all ranks; return its last chunk with the descriptor, or the error."""
        prompt = request.prompt_token_ids
        transfer_id, secret = secrets.token_bytes(TRANSFER_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        keep = Keep(slot, len(prompt), transfer_id, secret)
        self._send(keep)
        if failures := self._worker.keep(keep):
            self._run_on_all(Drop(transfer_id))
            error = f"the prompt's KV could not be kept for decode: {_first(failures)}"
            return TokenChunk((), "error", error, engine_failed=False)
        tp_size, pp_size = self._sizes
        descriptor = KvDescriptor(
            transfer_id=transfer_id,
            secret=secret,
            layout=self._layout,
            tp_size=tp_size,
            pp_size=pp_size,
            prompt_tokens=len(prompt),
            prompt_digest=digest_of(prompt),
            first_token=chunk.token_ids[-1],
            ranks=self._rank_shards,
        )
        return replace(chunk, kv_transfer_params=descriptor.to_json())

    def begin(self, request_id: str, slot: int, descriptor: KvDescriptor) -> None:
        """Let all ranks begin to fetch."""
        number = next(self._numbers)
        self._run_on_all(Pull(number, slot, descriptor.to_json()))
        self._pulling[number] = _Pulling(request_id, descriptor, time.monotonic())

    def poll(self) -> list[Prefilled]:
        """Return the requests whose pulls have finished since the last call."""
        if not self._pulling:
            return []
        poll = Poll(tuple(self._pulling))
        self._send(poll)
        ended = []
        for settled in self._worker.poll(poll):
            pulling = self._pulling.pop(settled.number)
            self._release_in_background(pulling.descriptor)
            error = f"the prompt's KV could not be fetched: {_first(settled.failures)}" if settled.failures else ""
            seconds = time.monotonic() - pulling.began
            if error:
                _log.warning("request %s: %s", pulling.request_id, error)
            ended.append(Prefilled(pulling.request_id, pulling.descriptor.first_token, seconds, error))
        return ended

    def cancel(self, request_id: str) -> None:
        """Let all ranks abandon a request's pull, if there is one."""
        for number in [number for number, pulling in self._pulling.items() if pulling.request_id == request_id]:
            self._run_on_all(Abandon(number))
            self._release_in_background(self._pulling.pop(number).descriptor)

    def pause_seconds(self) -> float:
        """Return the seconds until the next poll, which grow with the time waited so far."""
        waited = time.monotonic() - max((pulling.began for pulling in self._pulling.values()), default=0.0)
        return min(max(_FIRST_PAUSE_SECONDS, waited * _PAUSE_SHARE), _LONGEST_PAUSE_SECONDS)

    def _run_on_all(self, command: Drop | Pull | Abandon) -> None:
        self._send(command)
        self._worker.run(command)

    def _release_in_background(self, descriptor: KvDescriptor) -> None:
        """Release the KV at the prefill ranks, in the background."""
        try:
            threading.Thread(target=self._release, args=(descriptor,), name="kv-release", daemon=True).start()
        except RuntimeError as error:  # thread limit reached: the KV expires by itself
            _log.warning("KV was not released at the prefill worker: %s", error)

    def _release(self, descriptor: KvDescriptor) -> None:
        for failure in release(descriptor, Deadline.after(self._pull_seconds)):
            _log.info("KV was not released: %s", failure)


def _first(failures: tuple[str, ...]) -> str:
    rank, text = next((rank, text) for rank, text in enumerate(failures) if text)
    return f"rank {rank}: {text}"
