# SPDX-License-Identifier: Apache-2.0
"""Which requests an engine refuses before they queue. Pure."""

from __future__ import annotations

import math

from dynamo_mpi.engines.protocol import GenerationRequest, RequestError


def check_request(request: GenerationRequest, *, vocab_size: int, context_length: int) -> None:
    """Return if the engine can serve ``request``.

    Raises:
        RequestError: it can't; the text tells the client why and what would be served.
    """
    _check_lengths(request, context_length)
    for token_id in request.prompt_token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"the prompt holds token id {token_id}; this model's ids are 0 to {vocab_size - 1}")
    if request.offer_kv and request.max_tokens != 1:
        raise RequestError(f"max_tokens is {request.max_tokens}: a prompt's KV is handed over after its first token")
    sampling = request.sampling
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0:
        raise RequestError(f"temperature is {sampling.temperature}: it must be a number of at least 0")
    if not 0 <= sampling.top_p <= 1:
        raise RequestError(f"top_p is {sampling.top_p}: it must be between 0 and 1")


def _check_lengths(request: GenerationRequest, context_length: int) -> None:
    prompt, wanted = len(request.prompt_token_ids), request.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least one token")
    if wanted is not None and wanted < 1:
        raise RequestError(f"max_tokens is {wanted}: it must be at least 1")
    if prompt >= context_length:
        raise RequestError(
            f"the prompt has {prompt} tokens; this engine's context is {context_length} tokens: "
            f"shorten the prompt to at most {context_length - 1}"
        )
    if wanted is not None and prompt + wanted > context_length:
        raise RequestError(
            f"the prompt has {prompt} tokens and {wanted} were asked for; this engine's context is {context_length} "
            f"tokens: shorten the prompt or ask for at most {context_length - prompt}"
        )
    if wanted is not None and request.min_tokens > wanted:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than max_tokens, which is {wanted}")
