# SPDX-License-Identifier: Apache-2.0
"""The interface between the lifecycle and an engine, and its data types.

An engine is built on every rank of the world. ``load`` is collective. After it, rank 0 leads
(``start``, ``submit``, ``cancel``, ``close``) and every other rank calls ``follow``, which returns when rank 0
has closed the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: 0 takes the most likely token (greedy).
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        seed: makes a request repeatable; None draws a fresh one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    Args:
        request_id: unique among the requests in flight.
        prompt_token_ids: the prompt, at least one token.
        max_tokens: tokens to make at the most; None means up to the context length.
        min_tokens: stop tokens are not taken before this many.
        stop_token_ids: a token of this set ends the request; it is part of the output.
        sampling: how tokens are chosen.
        offer_kv: prefill: keep the prompt's KV for a decode worker; the last chunk says where it is.
        kv_offer: decode: where the prompt's KV is, as a prefill worker's last chunk said; its first token comes first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    offer_kv: bool = False
    kv_offer: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TokenChunk:
    """What a request got since its last chunk; the one with a ``finish_reason`` is its last.

    Args:
        token_ids: new tokens, none in a chunk that only ends the request.
        finish_reason: set on the last chunk.
        error: what went wrong, when ``finish_reason`` is ``"error"``.
        kv_offer: on the last chunk of a request with ``offer_kv``: JSON values, for a decode worker.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    kv_offer: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class EngineLimits:
    """What one engine can hold.

    Args:
        context_length: prompt and output tokens of one request together.
        max_batch_size: requests that run at once; more of them queue.
        max_num_tokens: tokens of one step, over all requests.
        kv_block_size: tokens of one KV-cache block.
        total_kv_blocks: KV-cache blocks of the whole engine.
    """

    context_length: int
    max_batch_size: int
    max_num_tokens: int
    kv_block_size: int
    total_kv_blocks: int


Sink = Callable[[TokenChunk], None]


class Engine(Protocol):
    """One engine over all ranks of a world."""

    @property
    def limits(self) -> EngineLimits:
        """Known after ``load``."""

    @property
    def pending_kv_transfers(self) -> int:
        """Rank 0: prompts whose KV waits for decode workers, who need this one until they have it. Thread-safe."""

    def load(self) -> None:
        """Load this rank's part. Collective.

        Raises:
            EngineError: this rank could not load; the other ranks are not told by the engine.
        """

    def start(self) -> None:
        """Rank 0: begin to run requests, in a thread of the engine's own."""

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Rank 0: queue a request. Thread-safe, never blocks. ``sink`` is called from the engine's thread,
        in order, and exactly once with a ``finish_reason``.

        Raises:
            RequestError: the request can't be served as it is (empty prompt, unknown token id, too long for the context).
        """

    def cancel(self, request_id: str) -> None:
        """Rank 0: end a request soon with ``finish_reason`` ``"cancelled"``. Unknown ids are ignored. Thread-safe."""

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Rank 0: call this once, from the engine's thread, if the engine can't go on."""

    def close(self) -> None:
        """Rank 0: cancel what is left, release the other ranks from ``follow``, join the thread. Idempotent."""

    def follow(self) -> None:
        """Ranks other than 0: take part in rank 0's steps until it closes the engine."""


class RequestError(ValueError):
    """A request the engine refuses: the client has to change it. The text is meant for the client."""
