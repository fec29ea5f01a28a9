# SPDX-License-Identifier: Apache-2.0
"""Step plans on the wire, how followers sleep, BLAS threads, attention in a batch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.attention import KeyValueCache, StepAttention
from dynamo_mpi.engines.reference.factory import thread_environment, usable_cores
from dynamo_mpi.engines.reference.steps import SequencePart, StepPlan, decode, encode, sleep_seconds

part = st.builds(
    SequencePart,
    slot=st.integers(0, 100),
    start=st.integers(0, 10_000),
    token_ids=st.lists(st.integers(0, 200_000), min_size=1, max_size=40).map(tuple),
    wants_logits=st.booleans(),
)


@given(st.lists(part, min_size=1, max_size=10).map(lambda parts: StepPlan(tuple(parts))))
def test_a_plan_survives_the_wire(plan: StepPlan) -> None:
    words = encode(plan)

    assert words.dtype == np.int64
    assert decode(words) == plan


@pytest.mark.parametrize("words", [[1, 2], [0, 0, 1, 0], [0, 0, 1, 3, 7, 7], [0, 0, 1, -1]])
def test_other_words_are_no_plan(words: list[int]) -> None:
    with pytest.raises(ValueError, match="step plan"):
        decode(np.array(words, np.int64))


def test_a_follower_looks_at_once_while_busy_and_rarely_when_idle() -> None:
    assert sleep_seconds(0.001) == 0
    assert 0 < sleep_seconds(0.003) < 0.001
    assert sleep_seconds(10) == sleep_seconds(1000) <= 0.005
    waits = [sleep_seconds(moment / 1000) for moment in range(1000)]
    assert waits == sorted(waits)


@pytest.mark.parametrize(
    ("local_size", "cores", "threads"), [(1, 8, "7"), (1, 1, "1"), (3, 2, "1"), (4, 64, "15"), (3, 8, "2")]
)
def test_ranks_share_the_cores(local_size: int, cores: int, threads: str) -> None:
    assert set(thread_environment(local_size, cores).values()) == {threads}


def test_thread_environment_of_this_host() -> None:
    assert thread_environment(1) == thread_environment(1, usable_cores())
    with pytest.raises(ValueError, match="local_size is 0"):
        thread_environment(0)


def test_the_thread_helper_imports_no_numpy() -> None:
    code = (
        "import sys, dynamo_mpi.engines.reference.factory; sys.exit('numpy' in sys.modules or 'mpi4py' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.dictionaries(
        st.integers(0, 5), st.tuples(st.integers(0, 30), st.integers(1, 4)), min_size=1, max_size=6
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_attention_is_the_textbook_one_however_the_step_is_laid_out(
    sequences: dict[int, tuple[int, int]], kv_heads: int, group: int
) -> None:
    head_dim = 4
    generator = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return generator.standard_normal(size).astype(np.float32)

    cache = KeyValueCache(2, 6, kv_heads, 40, head_dim)
    cache.keys[:], cache.values[:] = normal(*cache.keys.shape), normal(*cache.values.shape)
    plan = StepPlan(tuple(SequencePart(slot, start, (0,) * n, True) for slot, (start, n) in sequences.items()))
    tokens = plan.token_count
    queries, keys, values = (
        normal(tokens, kv_heads, group, head_dim), normal(tokens, kv_heads, head_dim), normal(tokens, kv_heads, head_dim)
    )  # fmt: skip

    attended = StepAttention(plan, cache)(1, queries, keys, values)

    row = 0
    for slot, (start, count) in sequences.items():
        for offset in range(count):
            position = start + offset
            assert np.array_equal(cache.keys[slot, 1, :, position], keys[row])
            for head in range(kv_heads):
                scores = queries[row, head] @ cache.keys[slot, 1, head, : position + 1].T
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                expected = weights / weights.sum(-1, keepdims=True) @ cache.values[slot, 1, head, : position + 1]
                assert attended[row, head] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            row += 1
