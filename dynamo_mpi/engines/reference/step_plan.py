# SPDX-License-Identifier: Apache-2.0
"""What all ranks compute in one step, and its encoding as integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

_ENTRY_HEADER = 4


@dataclass(frozen=True)
class SequencePart:
    """The tokens of one sequence that enter the model in a step.

    Args:
        slot: the sequence's row of the KV cache.
        start: position of the first token; the cache contains all earlier ones.
        token_ids: at least one.
        wants_logits: whether a token must be chosen after the last of these.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    wants_logits: bool


@dataclass(frozen=True)
class StepPlan:
    """One step: at least one part, each of another slot."""

    parts: tuple[SequencePart, ...]

    @property
    def parts_with_logits(self) -> tuple[SequencePart, ...]:
        """The parts after which a token is chosen, in the order of the logits' rows."""
        return tuple(part for part in self.parts if part.wants_logits)

    @property
    def token_count(self) -> int:
        return sum(len(part.token_ids) for part in self.parts)


def encode(plan: StepPlan) -> Int64Array:
    """Return the plan as int64: per part slot, start, wants_logits, number of tokens, tokens."""
    words: list[int] = []
    for part in plan.parts:
        words += (part.slot, part.start, int(part.wants_logits), len(part.token_ids))
        words += part.token_ids
    return np.array(words, np.int64)


def decode(words: Int64Array) -> StepPlan:
    """Decode the result of ``encode``.

    Raises:
        ValueError: ``words`` are not a plan.
    """
    values, parts, position = words.tolist(), [], 0
    while position < len(values):
        header = values[position : position + _ENTRY_HEADER]
        if len(header) < _ENTRY_HEADER:
            raise ValueError("a step plan ends in the middle of an entry")
        slot, start, wants_logits, count = header
        position += _ENTRY_HEADER
        if count < 1 or position + count > len(values):
            raise ValueError(f"a step plan entry announces {count} tokens")
        parts.append(SequencePart(slot, start, tuple(values[position : position + count]), bool(wants_logits)))
        position += count
    return StepPlan(tuple(parts))
