# SPDX-License-Identifier: Apache-2.0
"""Who fetches what from whom, against brute force over every layer and head."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.kv_descriptor import KvShard, slices_of
from dynamo_mpi.engines.reference.shape import part_of


def grid(layers: int, query_heads: int, kv_heads: int, tp_size: int, pp_size: int) -> list[KvShard]:
    """Lay a model out over ranks as the engine does."""
    group = query_heads // kv_heads
    holdings = []
    for rank in range(tp_size * pp_size):
        queries = part_of(query_heads, tp_size, rank % tp_size)
        heads = range(queries.start // group, (queries.stop - 1) // group + 1)
        holdings.append(KvShard(part_of(layers, pp_size, rank // tp_size), heads))
    return holdings


def cells(layers: range, heads: range) -> list[tuple[int, int]]:
    return [(layer, head) for layer in layers for head in heads]


@st.composite
def models(draw: st.DrawFn) -> tuple[int, int, int]:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    return draw(st.integers(6, 12)), kv_heads * draw(st.sampled_from([1, 2, 3])), kv_heads


@given(models(), st.data())
def test_every_cell_is_fetched_once_from_a_rank_that_holds_it(model: tuple[int, int, int], data: st.DataObject) -> None:
    sizes = st.sampled_from([size for size in range(1, 13) if model[1] % size == 0])
    stages = st.integers(1, 6)
    holders = grid(*model, data.draw(sizes), data.draw(stages))
    for rank, need in enumerate(grid(*model, data.draw(sizes), data.draw(stages))):
        pieces = slices_of(need, holders, rank)
        fetched = [cell for piece in pieces for cell in cells(piece.layers, piece.heads)]
        assert sorted(fetched) == cells(need.layers, need.heads)
        for piece in pieces:
            held = cells(holders[piece.rank].layers, holders[piece.rank].heads)
            assert set(cells(piece.layers, piece.heads)) <= set(held)


def test_equal_layouts_fetch_one_piece_each() -> None:
    holders = grid(30, 9, 3, 3, 1)

    assert [slices_of(need, holders, rank)[0].rank for rank, need in enumerate(holders)] == [0, 1, 2]
    assert all(len(slices_of(need, holders)) == 1 for need in holders)


def test_ranks_that_need_the_same_head_ask_different_ranks() -> None:
    holders = grid(30, 9, 3, 9, 1)

    assert [slices_of(need, holders, rank)[0].rank for rank, need in enumerate(holders)] == list(range(9))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_no_one_holds_is_reported(missing: int) -> None:
    holders = [holding for rank, holding in enumerate(grid(30, 9, 3, 3, 1)) if rank != missing]

    with pytest.raises(ValueError, match=f"no rank holds KV head {missing}"):
        slices_of(KvShard(range(30), range(3)), holders)
