# SPDX-License-Identifier: Apache-2.0
"""The KV cache of one rank, and attention over it with grouped query heads."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynamo_mpi.engines.reference.steps import StepPlan
from dynamo_mpi.engines.reference.weights import Float32Array

_WORTH_BATCHING = 64
"""Number of cache positions that take as long to read as one more pass through numpy."""


class KeyValueCache:
    """Keys and values of every slot: ``[slots, layers, kv heads, positions, head_dim]``, float32.

    The system allocates memory page by page as sequences grow.

    Raises:
        MemoryError: the system does not reserve this much.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int) -> None:
        size = (slots, layers, kv_heads, positions, head_dim)
        self.keys = _zeros_in_small_pages(size)
        self.values = _zeros_in_small_pages(size)


def _zeros_in_small_pages(size: tuple[int, ...]) -> Float32Array:
    """Return zeros whose memory is allocated when it is written.

    numpy asks for huge pages. A slot's first tokens would then take all of the slot's memory at once, as they go to
    every layer and head: measured, that is 0.2 s in the first step of each slot.
    """
    try:
        memory = mmap.mmap(-1, math.prod(size) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{math.prod(size) * 4} bytes for a KV cache") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(size)


@dataclass(frozen=True)
class _Single:
    """One part of the plan on its own: ``mask`` is ``[tokens, length]``, None for one token."""

    rows: slice
    slot: int
    length: int
    mask: Float32Array | None


@dataclass(frozen=True)
class _Batch:
    """Parts of one token each, computed together over a range of slots; ``mask`` is ``[slots, 1, 1, length]``."""

    rows: NDArray[np.intp]
    slots: slice
    places: NDArray[np.intp]
    length: int
    mask: Float32Array


class StepAttention:
    """Attention of one step: laid out once, then applied to every layer.

    Args:
        plan: the step.
        cache: receives the step's keys and values.
    """

    def __init__(self, plan: StepPlan, cache: KeyValueCache) -> None:
        self._cache = cache
        counts = [len(part.token_ids) for part in plan.parts]
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.positions: NDArray[np.intp] = np.concatenate(
            [np.arange(part.start, part.start + count) for part, count in zip(plan.parts, counts, strict=True)]
        )
        self._slots: NDArray[np.intp] = np.repeat([part.slot for part in plan.parts], counts)
        decoding = [index for index, count in enumerate(counts) if count == 1]
        lengths = [plan.parts[index].start + 1 for index in decoding]
        slots = [plan.parts[index].slot for index in decoding]
        self._batch: _Batch | None = None
        if _batching_pays(slots, lengths):
            self._batch = _lay_out_batch(starts[decoding], slots, lengths)
            decoding_alone: set[int] = set()
        else:
            decoding_alone = set(decoding)
        self._singles = [
            _lay_out_single(int(starts[index]), part.slot, part.start, counts[index])
            for index, part in enumerate(plan.parts)
            if counts[index] > 1 or index in decoding_alone
        ]

    def __call__(self, layer: int, queries: Float32Array, keys: Float32Array, values: Float32Array) -> Float32Array:
        """Return the attended values of one layer and put its keys and values into the cache.

        Args:
            layer: its index.
            queries: ``[tokens, kv heads, group, head_dim]``, rotated and scaled by ``head_dim ** -0.5``.
            keys: ``[tokens, kv heads, head_dim]``, rotated.
            values: ``[tokens, kv heads, head_dim]``.
        """
        cached_keys, cached_values = self._cache.keys[:, layer], self._cache.values[:, layer]
        cached_keys[self._slots, :, self.positions] = keys
        cached_values[self._slots, :, self.positions] = values
        attended = np.empty(queries.shape, np.float32)
        if self._batch is not None:
            batch = self._batch
            spread = np.zeros((batch.mask.shape[0], *queries.shape[1:]), np.float32)
            spread[batch.places] = queries[batch.rows]
            scores = spread @ cached_keys[batch.slots, :, : batch.length].swapaxes(-1, -2)
            scores += batch.mask
            attended[batch.rows] = _weighted(scores, cached_values[batch.slots, :, : batch.length])[batch.places]
        for single in self._singles:
            attended[single.rows] = _attend_alone(
                queries[single.rows],
                cached_keys[single.slot, :, : single.length],
                cached_values[single.slot, :, : single.length],
                single.mask,
            )
        return attended


def _batching_pays(slots: list[int], lengths: list[int]) -> bool:
    """Whether reading the padding of a batch costs less than going through numpy once per sequence."""
    if len(slots) < 2:
        return False
    padded = (max(slots) - min(slots) + 1) * max(lengths)
    return padded <= sum(lengths) + _WORTH_BATCHING * (len(slots) - 1)


def _lay_out_batch(rows: NDArray[np.intp], slots: list[int], lengths: list[int]) -> _Batch:
    lowest, longest = min(slots), max(lengths)
    places = np.array(slots) - lowest
    # an unused slot between them sees position 0 only, so that its row doesn't become 0/0
    visible = np.ones(max(slots) - lowest + 1, np.intp)
    visible[places] = lengths
    mask = np.where(np.arange(longest) < visible[:, None], np.float32(0), np.float32(-np.inf))
    return _Batch(rows, slice(lowest, max(slots) + 1), places, longest, mask[:, None, None])


def _lay_out_single(row: int, slot: int, start: int, count: int) -> _Single:
    length, mask = start + count, None
    if count > 1:
        unseen = np.arange(length) > np.arange(start, length)[:, None]
        mask = np.where(unseen, np.float32(-np.inf), np.float32(0))
    return _Single(slice(row, row + count), slot, length, mask)


def _attend_alone(
    queries: Float32Array, keys: Float32Array, values: Float32Array, mask: Float32Array | None
) -> Float32Array:
    """Attention of one sequence: queries as in a step, keys and values ``[kv heads, length, head_dim]``."""
    tokens, kv_heads, group, head_dim = queries.shape
    by_head = queries.transpose(1, 2, 0, 3).reshape(kv_heads, group * tokens, head_dim)
    scores = by_head @ keys.swapaxes(-1, -2)
    if mask is not None:
        by_token = scores.reshape(kv_heads, group, tokens, -1)
        by_token += mask
    attended = _weighted(scores, values).reshape(kv_heads, group, tokens, head_dim)
    by_row: Float32Array = attended.transpose(2, 0, 1, 3)
    return by_row


def _weighted(scores: Float32Array, values: Float32Array) -> Float32Array:
    """Return ``softmax(scores) @ values``, divided after the product, which has fewer numbers."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    product: Float32Array = scores @ values
    product /= scores.sum(-1, keepdims=True)
    return product
