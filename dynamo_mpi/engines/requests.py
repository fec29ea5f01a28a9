# SPDX-License-Identifier: Apache-2.0
"""Translates Dynamo's request and response objects to the engine's and back. Pure.

Unsupported options are refused, not ignored: a client that requests log probabilities or a second choice must not get a response
without them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.engines.protocol import TokenChunk

# values that mean "not requested"
_UNSUPPORTED_SAMPLING: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "min_p": (None, 0, 0.0),
    "use_beam_search": (None, False),
    "guided_decoding": (None,),
}
_UNSUPPORTED_OUTPUT: dict[str, tuple[object, ...]] = {
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}
_LONGEST_VALUE = 80
_UNSUPPORTED_INPUT = ("multi_modal_data", "prompt_embeds")


def to_generation_request(request_id: str, request: Mapping[str, Any]) -> GenerationRequest:
    """Translate Dynamo's ``PreprocessedRequest``.

    Raises:
        RequestError: the request has unsupported options, or is invalid.
    """
    stop = request.get("stop_conditions") or {}
    sampling = request.get("sampling_options") or {}
    output = request.get("output_options") or {}
    for options, unsupported in ((sampling, _UNSUPPORTED_SAMPLING), (output, _UNSUPPORTED_OUTPUT)):
        for key, neutral in unsupported.items():
            if options.get(key) not in neutral:
                raise RequestError(f"{key}={_short(options[key])} is not supported by this engine; leave it out")
    for key in _UNSUPPORTED_INPUT:
        if request.get(key):
            raise RequestError(f"{key} is not supported by this engine; send text alone")
    stop_ids = list(stop.get("stop_token_ids") or [])
    if not stop.get("ignore_eos"):
        stop_ids += [*(stop.get("stop_token_ids_hidden") or []), *(request.get("eos_token_ids") or [])]
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(request.get("token_ids") or ()),
        max_tokens=stop.get("max_tokens"),
        min_tokens=stop.get("min_tokens") or 0,
        stop_token_ids=frozenset(stop_ids),
        sampling=_sampling(sampling),
    )


def _short(value: object) -> str:
    """Return a value for a message: ``guided_decoding`` may hold a whole JSON Schema, for instance of ``tool_choice: required``."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def for_role(generation: GenerationRequest, request: Mapping[str, Any], role: str) -> GenerationRequest:
    """Adapt a request to this worker's role: prefill generates one token and offers the prompt's KV, decode continues from there.

    The runtime's own health checks, which have no peer, are served completely.

    Args:
        generation: the request as an aggregated worker would serve it.
        request: Dynamo's form of the request.
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.

    Raises:
        EngineError: a decode worker got a request without a prefill worker's result.
    """
    if role == "agg" or request.get("_HEALTH_CHECK"):
        return generation
    if role == "prefill":
        return replace(generation, max_tokens=1, min_tokens=min(generation.min_tokens, 1), keep_kv=True)
    result = request.get("prefill_result")
    offer = result.get("disaggregated_params") if isinstance(result, dict) else None
    if not isinstance(offer, dict):
        raise EngineError("this decode worker got a request without a prefill worker's result")
    return replace(generation, kv_transfer_params=offer)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Translate the sampling options; greedy by default, as in TensorRT-LLM's ``SamplingParams``."""
    temperature = options.get("temperature")
    top_p, top_k = options.get("top_p"), options.get("top_k")
    is_sampled = (top_p is not None and top_p < 1) or (top_k is not None and top_k > 1)
    return Sampling(
        temperature=float(temperature) if temperature is not None else (1.0 if is_sampled else 0.0),
        top_p=float(top_p) if top_p is not None else 1.0,
        # -1 also means all
        top_k=max(0, int(top_k)) if top_k is not None else 0,
        seed=options.get("seed"),
    )


def to_response(chunk: TokenChunk, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Translate one chunk to Dynamo's ``LLMEngineOutput``; the last one carries the usage.

    Args:
        chunk: the engine's chunk.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated so far, including this chunk's.
    """
    response: dict[str, Any] = {"token_ids": list(chunk.token_ids), "index": 0}
    if chunk.kv_transfer_params is not None:
        response["disaggregated_params"] = dict(chunk.kv_transfer_params)
    if chunk.finish_reason is not None:
        response["finish_reason"] = chunk.finish_reason
        response["completion_usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return response
