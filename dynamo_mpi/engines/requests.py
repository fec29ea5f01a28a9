# SPDX-License-Identifier: Apache-2.0
"""Translates Dynamo's request and response objects to the engine's and back. Pure.

What an engine can't honour is refused, not ignored: a client that asks for log probabilities or a second choice and gets
neither has been lied to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.engines.protocol import TokenChunk

# neutral values: these are what "not asked for" looks like
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
_UNSUPPORTED_INPUT = ("multi_modal_data", "prompt_embeds")


def to_generation_request(request_id: str, request: Mapping[str, Any]) -> GenerationRequest:
    """Translate Dynamo's ``PreprocessedRequest``.

    Raises:
        RequestError: it asks for something that the engine can't do, or isn't well formed.
    """
    stop = request.get("stop_conditions") or {}
    sampling = request.get("sampling_options") or {}
    output = request.get("output_options") or {}
    for options, unsupported in ((sampling, _UNSUPPORTED_SAMPLING), (output, _UNSUPPORTED_OUTPUT)):
        for key, neutral in unsupported.items():
            if options.get(key) not in neutral:
                raise RequestError(f"{key}={options[key]!r} is not supported by this engine; leave it out")
    for key in _UNSUPPORTED_INPUT:
        if request.get(key):
            raise RequestError(f"{key} is not supported by this engine; send text alone")
    ends = list(stop.get("stop_token_ids") or [])
    if not stop.get("ignore_eos"):
        ends += [*(stop.get("stop_token_ids_hidden") or []), *(request.get("eos_token_ids") or [])]
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(request.get("token_ids") or ()),
        max_tokens=stop.get("max_tokens"),
        min_tokens=stop.get("min_tokens") or 0,
        stop_token_ids=frozenset(ends),
        sampling=_sampling(sampling),
    )


def for_role(generation: GenerationRequest, request: Mapping[str, Any], role: str) -> GenerationRequest:
    """Make of a request what this worker's part of it is: prefill makes one token and offers the prompt's KV, decode goes on from there.

    The runtime's own health checks, which have no partner, are served whole.

    Args:
        generation: the request as a worker that does all would serve it.
        request: Dynamo's form of it.
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.

    Raises:
        EngineError: a decode worker was asked without any prefill worker's result.
    """
    if role == "agg" or request.get("_HEALTH_CHECK"):
        return generation
    if role == "prefill":
        return replace(generation, max_tokens=1, min_tokens=min(generation.min_tokens, 1), offer_kv=True)
    result = request.get("prefill_result")
    offer = result.get("disaggregated_params") if isinstance(result, dict) else None
    if not isinstance(offer, dict):
        raise EngineError("this decode worker was sent a request that no prefill worker has seen")
    return replace(generation, kv_offer=offer)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy unless the request says otherwise, as TensorRT-LLM's ``SamplingParams`` have it."""
    temperature = options.get("temperature")
    top_p, top_k = options.get("top_p"), options.get("top_k")
    asked = (top_p is not None and top_p < 1) or (top_k is not None and top_k > 1)
    return Sampling(
        temperature=float(temperature) if temperature is not None else (1.0 if asked else 0.0),
        top_p=float(top_p) if top_p is not None else 1.0,
        # -1 means all, too
        top_k=max(0, int(top_k)) if top_k is not None else 0,
        seed=options.get("seed"),
    )


def to_response(chunk: TokenChunk, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Translate one chunk to Dynamo's ``LLMEngineOutput``; the last one carries the usage.

    Args:
        chunk: what the engine made.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens made so far, this chunk's included.
    """
    response: dict[str, Any] = {"token_ids": list(chunk.token_ids), "index": 0}
    if chunk.kv_offer is not None:
        response["disaggregated_params"] = dict(chunk.kv_offer)
    if chunk.finish_reason is not None:
        response["finish_reason"] = chunk.finish_reason
        response["completion_usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return response
