# SPDX-License-Identifier: Apache-2.0
"""How a request is shared between prefill and decode. Only requests that one worker serves alone run here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def refuse_roles(params: DisaggregatedParams | None) -> None:
    """Return if one worker serves the request alone."""
    if params is not None and params.request_type not in (None, "context_and_generation"):
        raise NotImplementedError(f"the stand-in has no disaggregated roles: request_type is {params.request_type}")
