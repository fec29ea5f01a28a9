# SPDX-License-Identifier: Apache-2.0
"""The LLM that dynamo.trtllm constructs."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.spec import EngineSpec
from tensorrt_llm._environment import ROLE, VERSION, fault, reports_worker_death
from tensorrt_llm.disaggregated_params import DisaggregatedParams, for_role
from tensorrt_llm.executor.proxy import GenerationExecutor, GenerationExecutorProxy, GenerationExecutorWorker
from tensorrt_llm.executor.result import GenerationResult
from tensorrt_llm.executor.utils import RequestError, create_mpi_comm_session
from tensorrt_llm.inputs.data import prompt_of
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

from .llm_args import BaseLlmArgs
from .mpi_session import MpiSession, validate_session_world_size
from .tokenizer import tokenizer_factory

__all__ = ["LLM", "BaseLLM", "MultimodalEncoder", "SamplingParams"]
_MOST_SEQUENCES = 8


class BaseLLM:
    """An engine and its requests; the constructor returns when all ranks have loaded.

    Attributes:
        args: the validated arguments.
        mpi_session: its workers, None where the engine runs in this process.
    """

    def __init__(self, *, _mpi_session: MpiSession | None = None, **kwargs: Any) -> None:
        self.args = BaseLlmArgs(**kwargs)
        args = self.args
        tokenizer = tokenizer_factory(args.tokenizer or args.model)
        self._end_ids = tokenizer.end_ids if tokenizer is not None else frozenset()
        self.tokenizer = None if args.skip_tokenizer_init else tokenizer
        self.mpi_session: MpiSession | None = None
        self._request_ids = itertools.count(1)
        self._in_flight: set[str] = set()
        self._steps = self._steps_reported = 0
        self._stopped = False
        print(
            f"standin tensorrt_llm {VERSION}: tp {args.tensor_parallel_size} x pp {args.pipeline_parallel_size} x "
            f"cp {args.context_parallel_size} = {args.world_size} ranks, gpus_per_node {args.gpus_per_node}",
            file=sys.stderr,
            flush=True,
        )
        spec = _engine_spec(args)
        self._executor: GenerationExecutor
        if args.world_size == 1:
            self._executor = GenerationExecutorWorker(spec)
        else:
            self.mpi_session = _mpi_session or create_mpi_comm_session(args.world_size)
            if reports_worker_death():
                validate_session_world_size(self.mpi_session, args.world_size)
            self._executor = GenerationExecutorProxy(spec, self.mpi_session)
        _later(fault("unhealthy"), self._become_unhealthy)
        _later(fault("lose-lease"), lambda: os.kill(os.getpid(), signal.SIGTERM))

    def generate_async(
        self,
        inputs: list[int] | dict[str, Any],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: None = None,
        streaming: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: dict[str, str] | None = None,
        scheduling_params: SchedulingParams | None = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> GenerationResult:
        """Start a request.

        Raises:
            NotImplementedError: the stand-in lacks what is asked for.
            RequestError: the prompt is too long, or has images.
            ValueError: no engine would take it.
            RuntimeError: after ``shutdown``.
        """
        del trace_headers, cache_salt
        if self._stopped:
            raise RuntimeError("LLM is shutting down")
        prompt = prompt_of(inputs)
        if lora_request is not None:
            raise NotImplementedError("the stand-in has no LoRA")
        if scheduling_params is not None and scheduling_params.attention_dp_rank:
            raise NotImplementedError(f"the stand-in has no attention DP rank {scheduling_params.attention_dp_rank}")
        if not 0 <= priority <= 1:
            raise ValueError(f"priority must be between 0 and 1, got {priority}")
        sampling = sampling_params or SamplingParams()
        whole = self._fit(sampling.to_request(next(self._request_ids), prompt, self._end_ids))
        request = for_role(whole, disaggregated_params)
        keep_stop = sampling.include_stop_str_in_output
        result = GenerationResult(request, streaming, keep_stop, self._executor.cancel, disaggregated_params)

        def receive(chunk: TokenChunk) -> None:
            self._steps += 1
            if chunk.finish_reason is not None:
                self._in_flight.discard(request.request_id)
            result.receive(chunk)

        self._in_flight.add(request.request_id)
        self._executor.submit(request, receive)
        return result

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """Return the size of the KV cache in blocks."""
        limits = self._executor.limits
        return {"maxNumBlocks": limits.total_kv_blocks, "tokensPerBlock": limits.kv_block_size}

    async def get_stats_async(self, timeout: float = 2) -> AsyncIterator[dict[str, Any]]:
        """Yield what runs now, once, if anything has happened since the last time; each active request counts as a full slot."""
        if self._steps == self._steps_reported:
            await asyncio.sleep(timeout)
            return
        self._steps_reported = self._steps
        limits = self._executor.limits
        active = min(len(self._in_flight), limits.max_batch_size)
        used = active * limits.total_kv_blocks // limits.max_batch_size
        yield {
            "iter": self._steps,
            "numActiveRequests": active,
            "numQueuedRequests": len(self._in_flight) - active,
            "kvCacheStats": {"usedNumBlocks": used, "maxNumBlocks": limits.total_kv_blocks},
        }

    async def get_kv_cache_events_async(self, timeout: float = 2) -> AsyncIterator[dict[str, Any]]:
        """Yield nothing, slowly: the reference engine has no blocks that come and go."""
        if self.args.kv_cache_config.event_buffer_max_size <= 0:
            raise RuntimeError("kv_cache_config.event_buffer_max_size must be greater than 0 to get KV cache events")
        await asyncio.sleep(timeout)
        for event in list[dict[str, Any]]():
            yield event

    def shutdown(self) -> None:
        """End all requests and let the workers leave their task. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._executor.shutdown()

    def _check_health(self) -> bool:
        return not self._stopped and self._executor._fatal_error is None

    def _become_unhealthy(self) -> None:
        self._executor._fatal_error = RuntimeError("stand-in fault: unhealthy")

    def _fit(self, request: GenerationRequest) -> GenerationRequest:
        """Raise for a prompt that is too long; more tokens than there is room for are cut, as the real one does."""
        room = self._executor.limits.context_length - len(request.prompt_token_ids)
        if room <= 0:
            raise RequestError(
                f"The prompt length ({len(request.prompt_token_ids)}) should not exceed max_seq_len "
                f"({self._executor.limits.context_length}) - 1"
            )
        if request.max_tokens is None or request.max_tokens > room:
            return GenerationRequest(**(vars(request) | {"max_tokens": room}))
        return request


class LLM(BaseLLM):
    """The one that generates text."""


class MultimodalEncoder(BaseLLM):
    """Refuses."""

    def __init__(self, **_: object) -> None:
        raise NotImplementedError("the stand-in has no multimodal encoder")


def _engine_spec(args: BaseLlmArgs) -> EngineSpec:
    """Return the reference engine for these arguments. The real KV cache is shared by whatever runs, so that
    max_batch_size costs little; the reference engine has a slot for each sequence, hence fewer."""
    return EngineSpec(
        engine="reference",
        model_dir=args.model,
        tp_size=args.tensor_parallel_size,
        pp_size=args.pipeline_parallel_size,
        cp_size=args.context_parallel_size,
        max_batch_size=min(args.max_batch_size or _MOST_SEQUENCES, _MOST_SEQUENCES),
        max_num_tokens=args.max_num_tokens,
        max_seq_len=args.max_seq_len,
        tokens_per_block=args.kv_cache_config.tokens_per_block,
        role=ROLE,
    )


def _later(seconds: float | None, do: Callable[[], None]) -> None:
    if seconds is not None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()
