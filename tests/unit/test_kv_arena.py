# SPDX-License-Identifier: Apache-2.0
"""One block for all that is kept: arrays never overlap, and each goes back when the last view of it is gone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.gguf_tensors import Float32Array
from dynamo_mpi.engines.reference.kv_arena import Arena, ArenaFullError


def test_a_view_of_a_view_holds_its_place() -> None:
    arena = Arena(60)
    taken = arena.take((2, 3, 4))
    view = taken[1][:2]
    del taken
    with pytest.raises(ArenaFullError, match="60 numbers are needed side by side, the largest of 1 gaps has 36"):
        arena.take((60,))

    del view
    assert arena.take((60,)).size == 60


def test_what_is_taken_lies_in_the_block() -> None:
    arena = Arena(10)
    arena.take((4,))[:] = 1
    taken = arena.take((5,))
    taken[:] = 7
    assert np.array_equal(arena.memory[:5], np.full(5, 7, np.float32))


def test_an_empty_arena_has_nothing() -> None:
    with pytest.raises(ArenaFullError):
        Arena(0).take((1,))


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=60))
def test_no_two_overlap_and_all_of_it_comes_back(steps: list[tuple[int, bool]]) -> None:
    arena = Arena(100)
    held: list[tuple[int, Float32Array]] = []
    for number, (size, gives_back) in enumerate(steps):
        if gives_back and held:
            held.pop(size % len(held))
            continue
        try:
            held.append((number, arena.take((size,))))
        except ArenaFullError:
            assert arena.largest_gap < size
            continue
        held[-1][1][:] = number
    assert all((values == number).all() for number, values in held)
    held.clear()
    assert arena.largest_gap == 100
