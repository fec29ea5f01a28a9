# SPDX-License-Identifier: Apache-2.0
"""How a request is shared between prefill and decode: what the reference engine calls an offer of KV travels as the opaque state."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensorrt_llm._environment import ROLE

if TYPE_CHECKING:
    from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk

_REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")


@dataclass
class DisaggregatedParams:
    """As the real one has it, without the handles of multimodal requests."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_log_probs: list[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.request_type is not None and self.request_type not in _REQUEST_TYPES:
            raise ValueError(f"Unknown request type: {self.request_type}. Must be one of {', '.join(_REQUEST_TYPES)}")


def for_role(request: GenerationRequest, params: DisaggregatedParams | None) -> GenerationRequest:
    """Return this worker's part of a request.

    Raises:
        NotImplementedError: the reference engine was not loaded for that part.
    """
    if params is None or params.request_type in (None, "context_and_generation"):
        return request
    if (params.request_type, ROLE) == ("context_only", "prefill"):
        return replace(request, max_tokens=1, keep_kv=True)
    if (params.request_type, ROLE) == ("generation_only", "decode") and params.opaque_state is not None:
        return replace(request, kv_transfer_params=json.loads(params.opaque_state))
    raise NotImplementedError(f"the stand-in is loaded for role {ROLE}: request_type is {params.request_type}")


def offered(
    chunk: TokenChunk, request_id: int, token_ids: list[int], asked: DisaggregatedParams | None
) -> DisaggregatedParams | None:
    """Return what decode must know of a prompt that this worker has prefilled; None where it has not been asked to."""
    if chunk.kv_transfer_params is None or asked is None:
        return None
    state = json.dumps(dict(chunk.kv_transfer_params)).encode()
    return replace(asked, ctx_request_id=request_id, first_gen_tokens=list(token_ids), opaque_state=state)
