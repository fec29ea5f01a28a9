# SPDX-License-Identifier: Apache-2.0
"""The reference engine: accepts requests, emits chunks, and steps all ranks from one thread.

Only rank 0's engine thread uses the scheduler and, after ``start``, the engine's communicator. It waits on a condition while there is no
work.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dynamo_mpi.common.errors import EngineError, LayoutError
from dynamo_mpi.engines.protocol import EngineLimits, GenerationRequest, TokenCallback, TokenChunk
from dynamo_mpi.engines.reference.config import ReferenceConfig
from dynamo_mpi.engines.reference.kv_transfer import KvTransferScheduler
from dynamo_mpi.engines.reference.loading import Loaded, load_parts
from dynamo_mpi.engines.reference.requests import InFlight, Served, check_request
from dynamo_mpi.engines.reference.sampling import choose_token, generator_of
from dynamo_mpi.engines.reference.scheduler import Scheduler, Step, TokenChoice
from dynamo_mpi.engines.reference.steps import StepPlan
from dynamo_mpi.engines.reference.weights import Float32Array
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ReferenceConfig", "ReferenceEngine"]

_log = logging.getLogger(__name__)
_NOT_FINITE = "the model's output is not a number: its weights are damaged; compare the model's files with their source"


@dataclass(frozen=True)
class _Cancellation:
    request_id: str


class ReferenceEngine:
    """An ``Engine`` that runs a llama model on the CPUs of all ranks.

    Args:
        comm: all ranks of the engine. ``load`` duplicates it, so the caller may continue to use it. None is a world of one rank, without
            MPI.
        config: the engine's settings; the same on every rank.

    Raises:
        LayoutError: the number of ranks is not ``config.tp_size * config.pp_size``.
    """

    def __init__(self, comm: MPI.Intracomm | None, config: ReferenceConfig) -> None:
        self._comm = comm
        self._config = config
        self._rank, size = (0, 1) if comm is None else (comm.Get_rank(), comm.Get_size())
        if size != config.tp_size * config.pp_size:
            raise LayoutError(
                f"the engine has {counted(size, 'rank')}; tensor_parallel_size is {config.tp_size}, pipeline_parallel_size {config.pp_size}",
                expected="as many ranks as the product of the two",
                fix=f"start {counted(config.tp_size * config.pp_size, 'rank')}, or change the sizes in the engine config",
            )
        self._loaded: Loaded | None = None

        self._wake = threading.Condition()
        self._commands: deque[GenerationRequest | _Cancellation] = deque()
        self._in_flight = InFlight()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self._failure_callbacks: list[Callable[[BaseException], None]] = []

    @property
    def limits(self) -> EngineLimits:
        """The engine's capacity. Raises EngineError before ``load``."""
        return self._require_loaded().limits

    @property
    def pending_kv_transfers(self) -> int:
        """Rank 0: the number of prompts whose KV decode workers have not fetched yet."""
        return 0 if self._loaded is None else self._loaded.kv_worker.pending_kv_transfers

    def load(self) -> None:
        """Map this rank's shard of the weights and allocate its KV cache. Collective.

        Raises:
            ModelNotFoundError: the model can't be read, or is not one this engine computes.
            LayoutError: the model can't be split like this.
            ConfigFileError: ``max_seq_len`` is beyond the model's context.
            UsageError: this host has no address in the KV network.
            EngineError: the memory is too small, or KV can't be served.
        """
        self._loaded = load_parts(self._comm, self._config, self._rank)

    def start(self) -> None:
        """Rank 0: start the engine's thread, which runs requests.

        Raises:
            EngineError: the engine is not loaded, was started before, or MPI does not allow a second thread.
        """
        loaded = self._require_loaded()
        if self._rank != 0:
            raise EngineError(f"rank {self._rank} cannot start the engine: rank 0 does")
        if loaded.channel is not None:
            _require_threads()
        with self._wake:
            if self._thread is not None or self._closing:
                raise EngineError("the engine was started or closed before")
            self._thread = threading.Thread(target=self._run, args=(loaded,), name="reference-engine", daemon=True)
            self._thread.start()

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        """Rank 0: queue a request.

        Raises:
            RequestError: the request is invalid.
            EngineError: the engine is not running, or can't continue from another worker's KV.
        """
        loaded = self._require_loaded()
        check_request(request, vocab_size=loaded.vocab_size, context_length=loaded.limits.context_length)
        generator = generator_of(request.sampling.seed)
        descriptor = None if loaded.kv_scheduler is None else loaded.kv_scheduler.accept(request, loaded.vocab_size)
        if descriptor is not None and request.sampling.temperature != 0:
            generator.random()  # skip the draw of the first token, which prefill has made
        entry = Served(callback, generator, descriptor)
        with self._wake:
            if self._failure is not None:
                raise EngineError(
                    f"the engine has failed: {self._failure}",
                    expected="an engine whose ranks all run",
                    fix="start the worker again",
                )
            if self._thread is None or self._closing:
                raise EngineError("the engine is not running")
            self._in_flight.add(request.request_id, entry)
            self._commands.append(request)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Rank 0: cancel a request."""
        with self._wake:
            if request_id in self._in_flight:
                self._commands.append(_Cancellation(request_id))
                self._wake.notify()

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Rank 0: call ``callback`` once if the engine can't go on; immediately if it has failed already."""
        with self._wake:
            failure = self._failure
            if failure is None:
                self._failure_callbacks.append(callback)
        if failure is not None:
            callback(failure)

    def close(self) -> None:
        """Rank 0: cancel the remaining requests, release the other ranks, join the thread. Idempotent; does nothing on other ranks.

        After a failure the other ranks are not released: they may be inside a step, which only an abort of the world ends.
        """
        with self._wake:
            first = not self._closing
            self._closing = True
            self._wake.notify()
        thread = self._thread
        if thread is None:
            if first and self._rank == 0 and self._loaded is not None and self._loaded.channel is not None:
                self._loaded.channel.send_stop()
        elif thread is not threading.current_thread():
            thread.join()
        if self._loaded is not None and self._rank == 0:
            self._loaded.kv_worker.close()

    def follow(self) -> None:
        """Other ranks: compute rank 0's steps until it closes the engine. An error in a step is raised.

        The duplicated communicator is left to MPI_Finalize: freeing it is collective, and could hang a shutdown.
        """
        loaded = self._require_loaded()
        if loaded.channel is None or self._rank == 0:
            raise EngineError("rank 0 cannot follow: it leads")
        while (work := loaded.channel.receive()) is not None:
            if isinstance(work, StepPlan):
                loaded.transformer.forward(work)
            else:
                loaded.kv_worker.run(work)
        loaded.kv_worker.close()

    def _require_loaded(self) -> Loaded:
        if self._loaded is None:
            raise EngineError("the engine is not loaded yet")
        return self._loaded

    # What follows runs in rank 0's engine thread.

    def _run(self, loaded: Loaded) -> None:
        try:
            if loaded.kv_scheduler is None:
                raise EngineError("rank 0 has no scheduler of KV transfers")
            while self._take_commands(loaded.scheduler, loaded.kv_scheduler):
                self._fetch_prompts(loaded.scheduler, loaded.kv_scheduler)
                step = loaded.scheduler.next_step()
                if step is not None:
                    self._run_step(loaded, loaded.kv_scheduler, step)
                elif loaded.scheduler.has_work:
                    self._pause(loaded.kv_scheduler.pause_seconds())
            self._in_flight.end_all("cancelled", None)
            loaded.kv_worker.wait_for_readers()
            if loaded.channel is not None:
                loaded.channel.send_stop()
        except BaseException as error:  # this thread has no caller: report to clients and owner here
            self._fail(error)

    def _take_commands(self, scheduler: Scheduler, transfers: KvTransferScheduler) -> bool:
        """Wait for work, and pass new requests and cancellations to the scheduler. Return False to close."""
        with self._wake:
            while not (self._commands or self._closing or scheduler.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
            if self._closing:
                return False
        for command in commands:
            if isinstance(command, GenerationRequest):
                scheduler.add(command)
            elif scheduler.cancel(command.request_id):
                transfers.cancel(command.request_id)
                self._in_flight.deliver(command.request_id, TokenChunk((), "cancelled"))
        return True

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if not (self._commands or self._closing):
                self._wake.wait(seconds)

    def _fetch_prompts(self, scheduler: Scheduler, transfers: KvTransferScheduler) -> None:
        """Begin to fetch the KV of requests that got a slot, and schedule those whose KV has arrived."""
        for request, slot in scheduler.to_fetch():
            descriptor = self._in_flight[request.request_id].descriptor
            if descriptor is not None:
                transfers.begin(request.request_id, slot, descriptor)
        for prefilled in transfers.poll():
            request_id = prefilled.request_id
            if prefilled.error:
                scheduler.cancel(request_id)
                self._in_flight.deliver(request_id, TokenChunk((), "error", prefilled.error, engine_failed=False))
                continue
            _log.info("request %s: its prompt's KV came in %.1f ms", request_id, prefilled.seconds * 1000)
            chunk = scheduler.continue_after(request_id, prefilled.first_token)
            if not self._in_flight.deliver(request_id, chunk):
                scheduler.cancel(request_id)

    def _run_step(self, loaded: Loaded, transfers: KvTransferScheduler, step: Step) -> None:
        if loaded.channel is not None:
            loaded.channel.send_step(step.plan)
        logits = loaded.transformer.forward(step.plan)
        if logits is None:
            raise EngineError("rank 0 got no logits")
        # damaged weights or KV: such a row has no token, and argmax would give one all the same
        finite = [bool(np.isfinite(row).all()) for row in logits]
        damaged = {choice.request.request_id for choice, good in zip(step.choices, finite, strict=True) if not good}
        tokens = [
            self._choose(choice, row) if good else 0
            for choice, row, good in zip(step.choices, logits, finite, strict=True)
        ]
        # the slots of requests that end here are free from here on, and hold their KV until the next step
        offering = {
            choice.request.request_id: (choice.request, part.slot)
            for choice, part in zip(step.choices, step.plan.parts_with_logits, strict=True)
            if choice.request.keep_kv
        }
        for request_id, chunk in loaded.scheduler.apply(tokens):
            if request_id in damaged:
                loaded.scheduler.cancel(request_id)
                self._in_flight.deliver(request_id, TokenChunk((), "error", _NOT_FINITE, engine_failed=False))
                continue
            if chunk.finish_reason is not None and request_id in offering:
                chunk = transfers.with_descriptor(*offering[request_id], chunk)
            if not self._in_flight.deliver(request_id, chunk):
                loaded.scheduler.cancel(request_id)

    def _choose(self, choice: TokenChoice, logits: Float32Array) -> int:
        generator = self._in_flight[choice.request.request_id].generator
        return choose_token(logits, choice.request.sampling, generator, choice.banned)

    def _fail(self, error: BaseException) -> None:
        _log.error("the reference engine failed", exc_info=error)
        with self._wake:
            self._failure = error
            callbacks, self._failure_callbacks = self._failure_callbacks, []
        self._in_flight.end_all("error", f"the engine failed: {error}")
        for callback in callbacks:
            try:
                callback(error)
            except Exception:  # the next callback must run as well
                _log.exception("a failure callback failed")


def _require_threads() -> None:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise EngineError(
            "MPI was initialised without support for threads",
            expected="MPI_THREAD_MULTIPLE: the engine's thread and the main thread both call MPI",
            fix="let mpi4py initialise MPI with its default thread level",
        )
