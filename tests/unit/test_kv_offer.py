# SPDX-License-Identifier: Apache-2.0
"""The offer in ``disaggregated_params``: it survives JSON, and what isn't one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.kv_descriptor import (
    CacheLayout,
    DescriptorError,
    KvDescriptor,
    KvShard,
    RankShard,
    check_descriptor,
    digest_of,
    parse_descriptor,
)

LAYOUT = CacheLayout("smol-1", layers=30, kv_heads=3, head_dim=64, block_size=32)
PROMPT = (5, 6, 7)
OFFER = KvDescriptor(
    transfer_id=bytes(range(16)),
    secret=bytes(range(32)),
    layout=LAYOUT,
    tp_size=3,
    pp_size=1,
    prompt_tokens=3,
    prompt_digest=digest_of(PROMPT),
    first_token=8,
    ranks=tuple(RankShard("10.0.0.1", 4000 + r, KvShard(range(30), range(r, r + 1))) for r in range(3)),
)


def document(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(OFFER.to_json()))
    return found | changes


def rank(**changes: Any) -> list[dict[str, Any]]:
    return [document()["ranks"][0] | changes]


def test_an_offer_survives_json() -> None:
    assert parse_descriptor(document()) == OFFER
    by_ipv6 = replace(OFFER, ranks=(replace(OFFER.ranks[0], host="fd00::2"), *OFFER.ranks[1:]))
    assert parse_descriptor(json.loads(json.dumps(by_ipv6.to_json()))) == by_ipv6
    check_descriptor(OFFER, LAYOUT, PROMPT, vocab_size=100)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "nixl"},
        {"version": 2},
        {"transport": "rdma"},
        {"transport": None},
        {"transfer_id": "00"},
        {"secret": "zz" * 32},
        {"secret": None},
        {"layers": 0},
        {"layers": True},
        {"layers": "30"},
        {"prompt_tokens": 2**40},
        {"first_token": -1},
        {"dtype": ""},
        {"model": "a\nb"},
        {"ranks": []},
        {"ranks": {}},
        {"ranks": [7]},
        {"ranks": rank(port=70000)},
        {"ranks": rank(port=0)},
        {"ranks": rank(host="evil.example")},
        {"ranks": rank(host="fe80::1")},
        {"ranks": rank(host="fe80::1%eth0")},
        {"ranks": rank(kv_heads=[True, 2])},
        {"ranks": rank(layers=[3, 3])},
        {"ranks": rank(layers=[-1, 3])},
        {"ranks": rank(kv_heads=[0, 1, 2])},
        {"ranks": rank(kv_heads=[0.0, 1])},
    ],
)
def test_what_is_no_offer_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DescriptorError):
        parse_descriptor(document(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(sorted(OFFER.to_json())))
def test_any_json_is_read_or_refused(value: Any, key: str) -> None:
    with pytest.raises(DescriptorError):
        parse_descriptor(value)
    try:
        parse_descriptor(document(**{key: value}))
    except DescriptorError:
        return
    assert type(value) is type(document()[key])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": replace(LAYOUT, model="other")}, "model is other there"),
        ({"layout": replace(LAYOUT, head_dim=128)}, "head_dim is 128 there and 64 here"),
        ({"layout": replace(LAYOUT, dtype="float16")}, "dtype"),
        ({"prompt_tokens": 4}, "another prompt"),
        ({"prompt_digest": digest_of((5, 6, 8))}, "another prompt"),
        ({"first_token": 100}, "first token"),
        ({"tp_size": 9}, "names 3 ranks"),
    ],
)
def test_an_offer_for_something_else_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DescriptorError, match=words):
        check_descriptor(replace(OFFER, **changes), LAYOUT, PROMPT, vocab_size=100)
