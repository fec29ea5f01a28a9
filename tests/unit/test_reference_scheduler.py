# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: budgets, slots, ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.engines.protocol import GenerationRequest, TokenChunk
from dynamo_mpi.engines.reference.scheduler import Scheduler

CONTEXT = 40
STOP = 9


def request(
    name: str, prompt: int = 3, max_tokens: int | None = 4, min_tokens: int = 0, stop: frozenset[int] = frozenset()
) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), max_tokens, min_tokens, stop)


def step(scheduler: Scheduler, token: int = 5) -> dict[str, TokenChunk]:
    planned = scheduler.next_step()
    assert planned is not None
    return dict(scheduler.apply([token] * len(planned.choices)))


def parts(scheduler: Scheduler) -> list[tuple[int, int, int, bool]]:
    planned = scheduler.next_step()
    assert planned is not None
    found = [(part.slot, part.start, len(part.token_ids), part.wants_logits) for part in planned.plan.parts]
    scheduler.apply([5] * len(planned.choices))
    return found


def test_without_work_there_is_no_step() -> None:
    assert Scheduler(2, 8, CONTEXT).next_step() is None


def test_a_long_prompt_enters_in_chunks_beside_a_generating_sequence() -> None:
    scheduler = Scheduler(2, 4, CONTEXT)
    scheduler.add(request("short", prompt=2))
    assert parts(scheduler) == [(0, 0, 2, True)]
    scheduler.add(request("long", prompt=7))

    assert parts(scheduler) == [(0, 2, 1, True), (1, 0, 3, False)]
    assert parts(scheduler) == [(0, 3, 1, True), (1, 3, 3, False)]
    assert parts(scheduler) == [(0, 4, 1, True), (1, 6, 1, True)]
    assert parts(scheduler) == [(1, 7, 1, True)]


def test_prompts_enter_oldest_first() -> None:
    scheduler = Scheduler(3, 6, CONTEXT)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, prompt=4))

    assert parts(scheduler) == [(0, 0, 4, True), (1, 0, 2, False)]
    assert parts(scheduler) == [(0, 4, 1, True), (1, 2, 2, True), (2, 0, 3, False)]


def test_a_request_waits_for_a_slot() -> None:
    scheduler = Scheduler(1, 8, CONTEXT)
    scheduler.add(request("a", max_tokens=1))
    scheduler.add(request("b", max_tokens=1))

    assert step(scheduler) == {"a": TokenChunk((5,), "length")}
    assert step(scheduler) == {"b": TokenChunk((5,), "length")}
    assert not scheduler.has_work


def test_a_stop_token_is_part_of_the_output_and_ends_it() -> None:
    scheduler = Scheduler(1, 8, CONTEXT)
    scheduler.add(request("a", max_tokens=1, stop=frozenset({STOP})))

    assert step(scheduler, STOP) == {"a": TokenChunk((STOP,), "stop")}


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    scheduler = Scheduler(1, 8, CONTEXT)
    scheduler.add(request("a", min_tokens=2, stop=frozenset({STOP})))
    banned = []
    while (planned := scheduler.next_step()) is not None:
        banned.append(planned.choices[0].banned)
        scheduler.apply([5])

    assert banned == [{STOP}, {STOP}, frozenset(), frozenset()]


def test_without_max_tokens_the_context_is_filled() -> None:
    scheduler = Scheduler(1, 8, CONTEXT)
    scheduler.add(request("a", prompt=38, max_tokens=None))
    chunks = [chunk for _ in range(6) for chunk in step(scheduler).values()]

    assert chunks == [TokenChunk((5,)), TokenChunk((5,), "length")]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cancelling_frees_the_slot_for_the_next(steps: int) -> None:
    scheduler = Scheduler(1, 4, CONTEXT)
    scheduler.add(request("a", prompt=6))
    scheduler.add(request("b", max_tokens=1))
    for _ in range(steps):
        step(scheduler)

    assert scheduler.cancel("a")

    assert scheduler.free_slots == 1
    assert step(scheduler) == {"b": TokenChunk((5,), "length")}


def test_cancelling_a_waiting_or_unknown_request() -> None:
    scheduler = Scheduler(1, 4, CONTEXT)
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    step(scheduler)

    assert scheduler.cancel("b")
    assert not scheduler.cancel("b")
    assert not scheduler.cancel("c")


def test_cancelling_in_the_middle_of_a_step_is_a_mistake() -> None:
    scheduler = Scheduler(1, 4, CONTEXT)
    scheduler.add(request("a"))
    scheduler.next_step()

    with pytest.raises(RuntimeError, match="between next_step and apply"):
        scheduler.cancel("a")


def test_a_budget_below_the_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_tokens 3"):
        Scheduler(4, 3, CONTEXT)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[tuple[str, int, int | None, int]]]:
    """A scheduler's sizes, and what happens before each of its steps."""
    slots = draw(st.integers(1, 5))
    budget = draw(st.integers(slots, 20))
    event = st.tuples(
        st.sampled_from(["add", "cancel", "nothing"]),
        st.integers(1, CONTEXT - 1),
        st.none() | st.integers(1, 12),
        st.integers(0, 30),
    )
    return slots, budget, draw(st.lists(event, max_size=30))


@settings(max_examples=300, deadline=None)
@given(history=histories(), tokens=st.randoms(use_true_random=False))
def test_budgets_hold_every_request_ends_once_and_no_slot_leaks(history: Any, tokens: Any) -> None:
    slots, budget, events = history
    scheduler = Scheduler(slots, budget, CONTEXT)
    requests: dict[str, GenerationRequest] = {}
    computed: Counter[str] = Counter()
    output: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    pending, idle_steps = list(events), 0

    while pending or scheduler.has_work:
        kind, prompt, max_tokens, pick = pending.pop(0) if pending else ("nothing", 1, None, 0)
        if kind == "add":
            name = f"r{len(requests)}"
            limit = None if max_tokens is None else min(max_tokens, CONTEXT - prompt)
            requests[name] = request(name, prompt, limit, min_tokens=pick % 3, stop=frozenset({STOP}))
            output[name] = []
            scheduler.add(requests[name])
        elif kind == "cancel" and requests:
            name = f"r{pick % len(requests)}"
            assert scheduler.cancel(name) == (name not in ends)
            ends.setdefault(name, "cancelled")
        planned = scheduler.next_step()
        if planned is None:
            idle_steps += 1
            assert not scheduler.has_work
            continue

        assert 1 <= planned.plan.token_count <= budget
        used = [part.slot for part in planned.plan.parts]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(slots))
        assert all(part.start + len(part.token_ids) <= CONTEXT for part in planned.plan.parts)
        assert sum(part.wants_logits for part in planned.plan.parts) == len(planned.choices)
        chosen = [tokens.choice([t for t in range(12) if t not in choice.banned]) for choice in planned.choices]
        for (name, chunk), choice in zip(scheduler.apply(chosen), planned.choices, strict=True):
            assert name == choice.request.request_id
            assert name not in ends
            output[name] += chunk.token_ids
            computed[name] += 1
            if chunk.finish_reason is not None:
                ends[name] = chunk.finish_reason

    assert set(ends) == set(requests)
    assert scheduler.free_slots == slots
    for name, reason in ends.items():
        wanted, made = requests[name], output[name]
        room = CONTEXT - len(wanted.prompt_token_ids)
        limit = room if wanted.max_tokens is None else wanted.max_tokens
        assert STOP not in made[: wanted.min_tokens]
        assert STOP not in made[:-1]
        if reason == "stop":
            assert made[-1] == STOP
        elif reason == "length":
            assert len(made) == limit
        assert len(made) <= limit
