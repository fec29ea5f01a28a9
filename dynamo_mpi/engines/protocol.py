# SPDX-License-Identifier: Apache-2.0
"""The interface between the lifecycle and an engine, and its data types.

An engine is built on every rank of the world. ``load`` is collective. After it, rank 0 controls the engine
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
    """How the next token is sampled from the logits.

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
        max_tokens: largest number of generated tokens; None means up to the context length.
        min_tokens: stop tokens are ignored before this many generated tokens.
        stop_token_ids: a token of this set ends the request; it is part of the output.
        sampling: how tokens are sampled.
        keep_kv: prefill: keep the prompt's KV for a decode worker; the last chunk describes where it is.
        kv_transfer_params: decode: those of the prefill worker's last chunk; the prefill worker's token is generated first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    keep_kv: bool = False
    kv_transfer_params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TokenChunk:
    """The output of a request since its previous chunk; the chunk with a ``finish_reason`` is its last.

    Args:
        token_ids: new tokens, none in a chunk that only ends the request.
        finish_reason: set on the last chunk.
        error: the error, if ``finish_reason`` is ``"error"``.
        engine_failed: whether an error concerns the whole engine, not only this request.
        kv_transfer_params: on the last chunk of a request with ``keep_kv``: JSON values that describe the KV for a decode worker.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    engine_failed: bool = True
    kv_transfer_params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class EngineLimits:
    """An engine's capacity.

    Args:
        context_length: prompt and output tokens of one request together.
        max_batch_size: requests that run at once; further requests wait in a queue.
        max_num_tokens: tokens of one step, over all requests.
        kv_block_size: tokens of one KV-cache block.
        total_kv_blocks: KV-cache blocks of the whole engine.
    """

    context_length: int
    max_batch_size: int
    max_num_tokens: int
    kv_block_size: int
    total_kv_blocks: int


TokenCallback = Callable[[TokenChunk], None]


class Engine(Protocol):
    """One engine over all ranks of a world."""

    @property
    def limits(self) -> EngineLimits:
        """The engine's capacity; valid after ``load``."""

    @property
    def pending_kv_transfers(self) -> int:
        """Rank 0: the number of prompts whose KV decode workers have not fetched yet. Thread-safe."""

    def load(self) -> None:
        """Load this rank's shard. Collective.

        Raises:
            EngineError: this rank could not load; the engine doesn't notify the other ranks.
        """

    def start(self) -> None:
        """Rank 0: start the engine's thread, which runs requests."""

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        """Rank 0: queue a request. Thread-safe, never blocks. ``callback`` is called from the engine's thread,
        in order, and exactly once with a ``finish_reason``.

        Raises:
            RequestError: the request is invalid (empty prompt, unknown token id, too long for the context).
        """

    def cancel(self, request_id: str) -> None:
        """Rank 0: cancel a request: it ends soon with ``finish_reason`` ``"cancelled"``. Unknown ids are ignored. Thread-safe."""

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        """Rank 0: call ``callback`` once, from the engine's thread, if the engine can't go on."""

    def close(self) -> None:
        """Rank 0: cancel the remaining requests, release the other ranks from ``follow``, join the thread. Idempotent."""

    def follow(self) -> None:
        """Ranks other than 0: execute rank 0's steps until it closes the engine."""


class RequestError(ValueError):
    """A request that the engine refuses and that the client must change. The text is sent to the client."""
