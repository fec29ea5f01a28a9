# SPDX-License-Identifier: Apache-2.0
"""How a model is shared out among ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import LayoutError
from dynamo_mpi.engines.reference.shape import LlamaShape, part_of, share_of
from dynamo_mpi.layout.divisibility import head_divisors


def shape_of(heads: int, kv_heads: int, vocab_size: int = 49152) -> LlamaShape:
    return LlamaShape(
        num_hidden_layers=2,
        hidden_size=heads * 8,
        intermediate_size=1536,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=vocab_size,
        max_position_embeddings=128,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal"),
    [(9, 3, (1, 3, 9)), (32, 8, (1, 2, 4, 8, 16, 32)), (40, 8, (1, 2, 4, 8, 40)), (8, 8, (1, 2, 4, 8)), (7, 1, (1, 7))],
)
def test_legal_sizes(heads: int, kv_heads: int, legal: tuple[int, ...]) -> None:
    assert head_divisors(heads, kv_heads) == legal


@given(kv_heads=st.integers(1, 16), group=st.integers(1, 16), data=st.data())
def test_shares_cover_the_model_and_hold_the_key_value_heads_they_need(
    kv_heads: int, group: int, data: st.DataObject
) -> None:
    heads = kv_heads * group
    tp_size = data.draw(st.sampled_from(head_divisors(heads, kv_heads)))
    shape = shape_of(heads, kv_heads, vocab_size=data.draw(st.integers(tp_size, 1000)))

    shares = [share_of(shape, rank, tp_size) for rank in range(tp_size)]

    assert [head for share in shares for head in share.query_heads] == list(range(heads))
    assert [token for share in shares for token in share.vocabulary] == list(range(shape.vocab_size))
    assert [column for share in shares for column in share.intermediate] == list(range(shape.intermediate_size))
    for share in shares:
        local_group = len(share.query_heads) // len(share.kv_heads)
        needed = [share.kv_heads[place // local_group] for place in range(len(share.query_heads))]
        assert needed == [head // group for head in share.query_heads]


@pytest.mark.parametrize("tp_size", [0, 2, 4, 6, 18])
def test_other_sizes_are_refused_with_the_legal_ones(tp_size: int) -> None:
    with pytest.raises(LayoutError) as refusal:
        share_of(shape_of(9, 3), 0, tp_size)

    assert "1, 3, 9" in refusal.value.expected


@given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_parts_are_near_equal(total: int, parts: int) -> None:
    sizes = [len(part_of(total, parts, index)) for index in range(parts)]

    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
