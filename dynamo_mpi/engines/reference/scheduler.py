# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: selects the tokens of the next step and processes its results. Pure.

A request waits until a slot of the KV cache is free, and keeps it until it ends. Every step contains one token of each generating sequence
and fills the rest of ``max_num_tokens`` with prompts, the oldest first, in chunks if they don't fit. A request whose prompt another worker
has computed is scheduled after its KV is in its slot.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dynamo_mpi.engines.protocol import FinishReason, GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.steps import SequencePart, StepPlan


@dataclass(frozen=True)
class TokenChoice:
    """One row of the step's logits: its request, and the tokens that must not be chosen."""

    request: GenerationRequest
    banned: frozenset[int]


@dataclass(frozen=True)
class Step:
    """The plan for all ranks, and rank 0's choices for the rows of the logits."""

    plan: StepPlan
    choices: tuple[TokenChoice, ...]


@dataclass
class _RunningSequence:
    request: GenerationRequest
    slot: int
    token_limit: int
    awaits_kv: bool = False
    computed: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def prompt_done(self) -> bool:
        return self.computed >= len(self.request.prompt_token_ids)

    def next_part(self, budget: int) -> SequencePart:
        """Return the next tokens after those in the cache, at most ``budget``."""
        prompt = self.request.prompt_token_ids
        if self.prompt_done:
            return SequencePart(self.slot, self.computed, (self.generated[-1],), True)
        tokens = prompt[self.computed : self.computed + budget]
        return SequencePart(self.slot, self.computed, tokens, self.computed + len(tokens) == len(prompt))

    def finish_reason(self) -> FinishReason | None:
        if self.generated[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self.generated) >= self.token_limit else None


class Scheduler:
    """Requests in flight and their slots.

    Args:
        max_batch_size: number of slots.
        max_num_tokens: tokens of one step, at least ``max_batch_size``, so that no sequence starves.
        context_length: tokens of a slot; requests must have passed ``check_request`` for it.
    """

    def __init__(self, max_batch_size: int, max_num_tokens: int, context_length: int) -> None:
        if max_num_tokens < max_batch_size:
            raise ValueError(f"max_num_tokens {max_num_tokens} is smaller than max_batch_size {max_batch_size}")
        self._max_num_tokens = max_num_tokens
        self._context_length = context_length
        self._free_slots = list(range(max_batch_size))
        self._waiting: deque[GenerationRequest] = deque()
        self._running: dict[str, _RunningSequence] = {}
        self._in_step: list[tuple[_RunningSequence, SequencePart]] = []
        self._to_fetch: list[_RunningSequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def cancel(self, request_id: str) -> bool:
        """Remove a request between two steps and free its slot. Return whether it existed."""
        if self._in_step:
            raise RuntimeError("a request was cancelled between next_step and apply")
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._release(sequence)
            return True
        remaining = [request for request in self._waiting if request.request_id != request_id]
        found = len(remaining) < len(self._waiting)
        self._waiting = deque(remaining)
        return found

    def to_fetch(self) -> list[tuple[GenerationRequest, int]]:
        """Return the requests that got a slot since the last call and whose KV must be fetched."""
        self._admit()
        sequences, self._to_fetch = self._to_fetch, []
        return [(sequence.request, sequence.slot) for sequence in sequences]

    def continue_after(self, request_id: str, first_token: int) -> TokenChunk:
        """Schedule a request whose prompt's KV is in its slot; ``first_token`` is the token after the prompt."""
        sequence = self._running[request_id]
        sequence.awaits_kv = False
        sequence.computed = len(sequence.request.prompt_token_ids)
        sequence.generated.append(first_token)
        reason = sequence.finish_reason()
        if reason is not None:
            self._release(sequence)
        return TokenChunk((first_token,), reason)

    def next_step(self) -> Step | None:
        """Return the next step; None if there is nothing to compute. Call ``apply`` before any other method."""
        self._admit()
        ready = [sequence for sequence in self._running.values() if not sequence.awaits_kv]
        if not ready:
            return None
        budget = self._max_num_tokens
        parts: list[tuple[_RunningSequence, SequencePart]] = []
        # generating sequences first: their next token must not wait for a long prompt; the sort keeps the order of arrival
        by_phase = sorted(ready, key=lambda sequence: not sequence.prompt_done)
        for sequence in by_phase:
            if budget == 0:
                break
            part = sequence.next_part(budget)
            parts.append((sequence, part))
            budget -= len(part.token_ids)
        self._in_step = parts
        choices = tuple(_choice(sequence) for sequence, part in parts if part.wants_logits)
        return Step(StepPlan(tuple(part for _, part in parts)), choices)

    def apply(self, tokens: Sequence[int]) -> list[tuple[str, TokenChunk]]:
        """Process the step's result: one token per choice, in their order. Return each request's output."""
        remaining = iter(tokens)
        chunks: list[tuple[str, TokenChunk]] = []
        parts, self._in_step = self._in_step, []
        for sequence, part in parts:
            sequence.computed += len(part.token_ids)
            if not part.wants_logits:
                continue
            token = next(remaining)
            sequence.generated.append(token)
            reason = sequence.finish_reason()
            if reason is not None:
                self._release(sequence)
            chunks.append((sequence.request.request_id, TokenChunk((token,), reason)))
        return chunks

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            room = self._context_length - len(request.prompt_token_ids)
            limit = room if request.max_tokens is None else min(request.max_tokens, room)
            # the lowest slot keeps used slots together, which is faster for attention over a range of slots
            slot, awaits_kv = heapq.heappop(self._free_slots), request.kv_transfer_params is not None
            sequence = _RunningSequence(request, slot, limit, awaits_kv)
            self._running[request.request_id] = sequence
            if awaits_kv:
                self._to_fetch.append(sequence)

    def _release(self, sequence: _RunningSequence) -> None:
        del self._running[sequence.request.request_id]
        self._to_fetch = [other for other in self._to_fetch if other is not sequence]
        heapq.heappush(self._free_slots, sequence.slot)


def _choice(sequence: _RunningSequence) -> TokenChoice:
    too_early = len(sequence.generated) < sequence.request.min_tokens
    return TokenChoice(sequence.request, sequence.request.stop_token_ids if too_early else frozenset())
