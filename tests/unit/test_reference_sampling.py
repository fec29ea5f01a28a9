# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen from logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.protocol import Sampling
from dynamo_mpi.engines.reference.sampling import choose_token, generator_of

PROBABILITIES = np.array([0.05, 0.5, 0.15, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def draws(sampling: Sampling, count: int = 4000, **keywords: frozenset[int]) -> np.ndarray:
    generator = generator_of(1)
    chosen = [choose_token(LOGITS, sampling, generator, **keywords) for _ in range(count)]
    return np.bincount(chosen, minlength=4) / count


def test_greedy_takes_the_most_likely_and_draws_nothing() -> None:
    generator = generator_of(3)

    assert choose_token(LOGITS, Sampling(), generator) == 1
    assert generator.random() == generator_of(3).random()


def test_draws_follow_the_distribution() -> None:
    assert draws(Sampling(temperature=1.0)) == pytest.approx(PROBABILITIES, abs=0.03)


def test_temperature_sharpens() -> None:
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()

    assert draws(Sampling(temperature=0.5)) == pytest.approx(squared, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_p=0.79), {1, 3}),
        (Sampling(1.0, top_p=0.81), {1, 2, 3}),
        (Sampling(1.0, top_p=0.0), {1}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=-1), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=3, top_p=0.84), {1, 3}),
        (Sampling(1.0, top_k=3, top_p=0.85), {1, 2, 3}),
        (Sampling(1e-6), {1}),
    ],
)
def test_unlikely_tokens_are_dropped(sampling: Sampling, kept: set[int]) -> None:
    shares = draws(sampling, 1500)

    assert set(np.flatnonzero(shares).tolist()) == kept
    allowed = np.where(np.isin(np.arange(4), list(kept)), PROBABILITIES, 0)
    assert shares == pytest.approx(allowed / allowed.sum(), abs=0.05)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_come(temperature: float) -> None:
    shares = draws(Sampling(temperature), 500, banned=frozenset({1, 3, 77, -1}))

    assert shares[[1, 3]].sum() == 0


def test_the_logits_are_left_alone() -> None:
    logits = LOGITS.copy()
    choose_token(logits, Sampling(0.7, top_k=2), generator_of(0), frozenset({1}))

    assert np.array_equal(logits, LOGITS)


@pytest.mark.parametrize("seed", [0, -5, 2**70])
def test_a_seed_repeats_itself(seed: int) -> None:
    assert generator_of(seed).random() == generator_of(seed).random()


def test_without_a_seed_no_two_are_alike() -> None:
    assert generator_of(None).random() != generator_of(None).random()


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(0, 5),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 50),
)
def test_the_choice_is_in_the_smallest_set_that_reaches_top_p(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    row = np.array(logits, np.float32)

    token = choose_token(row, Sampling(temperature, top_p, top_k), generator_of(0))

    better = [logit for logit in logits if logit > logits[token]]
    if 1 <= top_k < len(logits):
        assert len(better) < top_k
    if temperature > 0:
        with np.errstate(over="ignore"):
            weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
        kept = np.sort(weights)[::-1][: top_k if top_k >= 1 else None]
        # logits that differ may be equally likely
        mass_before = weights[weights > weights[token]].sum() / kept.sum()
        assert mass_before <= top_p + 1e-9 or not better
