# SPDX-License-Identifier: Apache-2.0
"""Samples a token from logits: greedy, temperature, top-k, top-p. Pure."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from dynamo_mpi.engines.protocol import Sampling
from dynamo_mpi.engines.reference.weights import Float32Array

_SEED_RANGE = 2**64


def generator_of(seed: int | None) -> np.random.Generator:
    """Return the random generator of one request: the same for the same seed, which may be any integer."""
    return np.random.default_rng(None if seed is None else seed % _SEED_RANGE)


def choose_token(
    logits: Float32Array, sampling: Sampling, generator: np.random.Generator, banned: Collection[int] = ()
) -> int:
    """Return the next token.

    Each call takes exactly one number from ``generator``, so that a request's tokens don't depend on other requests.

    Args:
        logits: ``[vocabulary]``; not changed.
        sampling: temperature, then top-k, then top-p are applied. ``top_k`` below 1 keeps all tokens.
        generator: the request's generator.
        banned: token ids that must not be chosen; those outside the vocabulary are ignored.
    """
    inside = [token for token in banned if 0 <= token < len(logits)]
    if inside:
        logits = logits.copy()
        logits[inside] = -np.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # -infinity is correct for a temperature near 0
        weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    candidates = _kept(weights / weights.sum(), sampling.top_k, sampling.top_p)
    cumulative = np.cumsum(weights[candidates])
    drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(candidates[min(int(drawn), len(candidates) - 1)])


def _kept(probabilities: NDArray[np.float64], top_k: int, top_p: float) -> NDArray[np.intp]:
    """Return the token ids that remain; if some are dropped, the most likely first."""
    count = len(probabilities)
    candidates = np.arange(count)
    if 1 <= top_k < count:
        candidates = np.argpartition(-probabilities, top_k - 1)[:top_k]
    if top_p >= 1:
        return candidates
    total = probabilities[candidates].sum()
    # tokens below this have together less than 1 - top_p: none is in the set, so none needs sorting
    candidates = candidates[probabilities[candidates] >= (1 - top_p) * total / count]
    candidates = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    before = np.cumsum(probabilities[candidates]) - probabilities[candidates]
    kept: NDArray[np.intp] = candidates[: max(1, int(np.count_nonzero(before < top_p * total)))]
    return kept
