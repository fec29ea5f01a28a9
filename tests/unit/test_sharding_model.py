# SPDX-License-Identifier: Apache-2.0
"""A second opinion: heads, rows, experts and layers handed out to ranks one by one, without any of the rules' arithmetic.

Where some rank gets a part of something, or other amounts than its neighbours, a rule must say so; and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.layout import Cluster, Layout, LayoutSpec, layout_of
from dynamo_mpi.layout.model_shape import Experts, Feed, Layer, LayerFormats, ModelShape
from dynamo_mpi.layout.quantisation import FP8_BLOCK_SCALES, Quantisation, WeightFormat
from dynamo_mpi.layout.rules.registry import layout_findings
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

BLOCK = 128
BLOCKS = WeightFormat(FP8_BLOCK_SCALES, BLOCK)


def deal(items: int, ranks: int) -> list[list[int]]:
    """Hand out items in runs, as tensors are cut: rank 0 takes until it has its share, then rank 1 does."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for item in range(items):
        hands[min(rank for rank in range(ranks) if len(hands[rank]) * ranks < items)].append(item)
    return hands


def fair(items: int, ranks: int) -> bool:
    """Does every rank get as much as every other, and at least something?"""
    amounts = {len(hand) for hand in deal(items, ranks)}
    return len(amounts) == 1 and amounts != {0}


def kv_fair(kv_heads: int, ranks: int) -> bool:
    """Hand out KV heads; where there are too few, hand each to as many ranks as all others."""
    if kv_heads >= ranks:
        return fair(kv_heads, ranks)
    holders = Counter[int]()
    head = 0
    for _ in range(ranks):
        holders[head] += 1
        head = 0 if head + 1 == kv_heads else head + 1
    return len(set(holders.values())) == 1


def whole_blocks(items: int, ranks: int) -> bool:
    """Does every cut fall between two scaling blocks?"""
    return all(hand[0] % BLOCK == 0 for hand in deal(items, ranks))


def finding_ids(shape: ModelShape, config: EngineConfig, ranks: int | None = None) -> set[str]:
    subject = LayoutSpec(shape, config, Cluster(1, ranks or config.world_size), "decode", launched=True)
    return {finding.rule for finding in errors(layout_findings(subject))}


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_dealer_deals_everything_in_order(items: int, ranks: int) -> None:
    hands = deal(items, ranks)
    assert [item for hand in hands for item in hand] == list(range(items))


@given(*[st.integers(1, 6)] * 3, st.integers(1, 220))
def test_a1_every_place_has_a_rank_and_every_rank_a_place(tp: int, pp: int, cp: int, ranks: int) -> None:
    places = [(stage, context, slice_) for stage in range(pp) for context in range(cp) for slice_ in range(tp)]
    config = EngineConfig(tp, pp, cp, cp_type="HELIX" if cp > 1 else None)
    assert ("A1" in finding_ids(ModelShape("M"), config, ranks)) == (len(places) != ranks)


@given(st.integers(1, 12), st.integers(1, 4), *[st.integers(1, 13) | st.none()] * 3, st.booleans())
def test_a2_every_rank_of_a_stage_has_one_share_of_the_experts(
    tp: int, cp: int, moe_tp: int | None, moe_ep: int | None, moe_cluster: int | None, helix: bool
) -> None:
    cp = cp if helix else 1
    config = EngineConfig(
        tp,
        cp_size=cp,
        cp_type="HELIX" if cp > 1 else None,
        moe_tp_size=moe_tp,
        moe_ep_size=moe_ep,
        moe_cluster_size=moe_cluster,
    )
    ranks = [(context, slice_) for context in range(cp) for slice_ in range(tp)]
    layout = layout_of(config)
    shares = [
        (cluster, part, group)
        for cluster in range(layout.moe_cluster_size)
        for part in range(layout.moe_tp_size)
        for group in range(layout.moe_ep_size)
    ]
    assert ("A2" in finding_ids(ModelShape("M"), config)) == (len(ranks) != len(shares))
    # what was said is kept, and what wasn't is filled in
    assert moe_tp is None or layout.moe_tp_size == moe_tp
    assert moe_ep is None or layout.moe_ep_size == moe_ep


@settings(max_examples=200)
@given(st.integers(1, 96), st.integers(1, 96), st.integers(1, 24), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_b1_and_b3_every_rank_has_whole_heads(
    heads: int, kv_heads: int, tp: int, cp: int, pp: int, attention_dp: bool
) -> None:
    config = EngineConfig(
        tp, pp, cp, cp_type="HELIX" if cp > 1 else None, enable_attention_dp=attention_dp, moe_ep_size=1
    )
    found = finding_ids(ModelShape("M", heads, kv_heads), config)
    # under attention DP every rank is a group of its own
    group = [(c, t) for c in range(cp) for t in range(1 if attention_dp else tp)]
    assert ("B1" in found) == (not fair(heads, len(group)))
    kv_group = range(1 if attention_dp else tp)
    assert ("B3" in found) == (not kv_fair(kv_heads, len(kv_group)))


def with_experts(count: int, width: int, layers: int = 2) -> ModelShape:
    return ModelShape(
        "M", num_layers=layers, experts=Experts(count, 1, width), layers=(Layer(feed=Feed.EXPERTS),) * layers
    )


@settings(max_examples=200)
@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_d1_and_d5_every_rank_has_whole_experts_or_equal_slices(
    count: int, width: int, moe_tp: int, moe_ep: int, attention_dp: bool
) -> None:
    config = EngineConfig(moe_tp * moe_ep, moe_tp_size=moe_tp, moe_ep_size=moe_ep, enable_attention_dp=attention_dp)
    found = finding_ids(with_experts(count, width), config)
    assert ("D1" in found) == (not fair(count, moe_ep))
    assert ("D5" in found) == (not fair(width, moe_tp))
    assert "A2" not in found


@settings(max_examples=200)
@given(st.integers(1, 600), st.integers(1, 16), st.sampled_from([1, 2]), st.booleans())
def test_e1_every_rank_has_as_much_of_an_mlp(width: int, tp: int, cp: int, attention_dp: bool) -> None:
    shape = ModelShape("M", intermediate_size=width)
    config = EngineConfig(tp, cp_size=cp, cp_type="HELIX" if cp > 1 else None, enable_attention_dp=attention_dp)
    broken = not attention_dp and not fair(width, tp * cp)
    assert ("E1" in finding_ids(shape, config)) == broken


@settings(max_examples=150)
@given(st.integers(1, 48), st.integers(0, 2), st.integers(1, 12), st.sampled_from([1, 2]))
def test_e4_every_rank_has_whole_scaling_blocks_of_an_mlp(blocks: int, more: int, tp: int, cp: int) -> None:
    width = blocks * 32 + more
    shape = ModelShape(
        "M",
        intermediate_size=width,
        layers=(Layer(formats=LayerFormats(feed=BLOCKS)),),
        quantisation=Quantisation(FP8_BLOCK_SCALES, 128),
    )
    config = EngineConfig(tp, cp_size=cp, cp_type="HELIX" if cp > 1 else None)
    found = finding_ids(shape, config)
    ranks = tp * cp
    assert ("E1" in found) == (not fair(width, ranks))
    if fair(width, ranks):
        # one rank alone may end in a broken block: it has all there is
        assert ("E4" in found) == (ranks > 1 and not (whole_blocks(width, ranks) and width % BLOCK == 0))


@settings(max_examples=150)
@given(st.integers(1, 48), st.integers(1, 48), st.sampled_from([32, 64, 96, 128, 192]), st.integers(1, 12))
def test_e4_every_rank_has_whole_scaling_blocks_of_heads(heads: int, kv_heads: int, size: int, tp: int) -> None:
    shape = ModelShape(
        "M",
        heads,
        kv_heads,
        size,
        layers=(Layer(formats=LayerFormats(mixer=BLOCKS)),),
        quantisation=Quantisation(FP8_BLOCK_SCALES, 128),
    )
    found = finding_ids(shape, EngineConfig(tp))
    if not (fair(heads, tp) and kv_fair(kv_heads, tp)):
        assert {"B1", "B3"} & found
        assert "E4" not in found
        return
    query = len(deal(heads, tp)[0]) * size
    held = max(1, len(deal(kv_heads, tp)[0])) * size
    assert ("E4" in found) == (tp > 1 and (query % BLOCK != 0 or held % BLOCK != 0))


@given(st.integers(1, 40), st.integers(1, 45))
def test_f3_every_stage_has_a_layer(layers: int, pp: int) -> None:
    stages: list[list[int]] = [[] for _ in range(pp)]
    for layer in range(layers):
        stages[layer % pp].append(layer)
    assert ("F3" in finding_ids(ModelShape("M", num_layers=layers), EngineConfig(pp_size=pp))) == any(
        not stage for stage in stages
    )


def tensor_split(items: Sequence[int], sections: int) -> list[Sequence[int]]:
    """As torch's documentation defines ``tensor_split`` for a number of sections."""
    parts: list[Sequence[int]] = []
    start = 0
    for section in range(sections):
        size = len(items) // sections + 1 if section < len(items) % sections else len(items) // sections
        parts.append(items[start : start + size])
        start += size
    return parts


@given(st.integers(0, 200), st.integers(1, 50))
def test_f1_stages_are_cut_as_torch_does(layers: int, pp: int) -> None:
    sizes = Layout(1, pp).stage_sizes(layers)
    assert sizes == [len(part) for part in tensor_split(range(layers), pp)]
    assert sum(sizes) == layers
    assert sorted(sizes, reverse=True) == sizes
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("layers", "pp", "partition", "sizes"),
    [
        (61, 2, None, [31, 30]),
        (61, 4, None, [16, 15, 15, 15]),
        (80, 2, (30, 50), [30, 50]),
        # one that doesn't fit is refused (F2), and meanwhile counts for nothing
        (80, 2, (30, 51), [40, 40]),
        (80, 2, (80,), [40, 40]),
    ],
)
def test_stage_sizes(layers: int, pp: int, partition: tuple[int, ...] | None, sizes: list[int]) -> None:
    assert Layout(1, pp).stage_sizes(layers, partition) == sizes


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    moe_tp, moe_ep = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pp = draw(st.integers(1, 4))
    version = draw(st.sampled_from([None, "1.0.0", "1.1.0", "1.2.1", "1.3.0rc20"]))
    # before 1.2 experts are divided over the tensor ranks alone, and every context rank has them all
    over_cp = version not in ("1.0.0", "1.1.0")
    cp = draw(st.sampled_from([1, 1, *(n for n in (2, 4) if not over_cp or moe_tp * moe_ep % n == 0)]))
    config = EngineConfig(
        moe_tp * moe_ep // (cp if over_cp else 1),
        pp,
        cp,
        cp_type="HELIX" if cp > 1 else None,
        moe_tp_size=moe_tp,
        moe_ep_size=moe_ep,
        enable_attention_dp=draw(st.booleans()),
    )
    layout = layout_of(config, None if version is None else parse_trtllm_version(version))
    assert layout.multiplies_out
    return layout


SIZES = {"tp": "tp_size", "pp": "pp_size", "cp": "cp_size", "moe_tp": "moe_tp_size", "moe_ep": "moe_ep_size"}


@given(layouts())
def test_every_rank_is_in_one_group_of_each_kind(layout: Layout) -> None:
    for kind, size in SIZES.items():
        groups = layout.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {getattr(layout, size)}
        assert all(group == sorted(group) for group in groups)


@given(layouts())
def test_groups_of_different_kinds_cross_in_one_rank(layout: Layout) -> None:
    for first, second in (("tp", "pp"), ("tp", "cp"), ("pp", "cp"), ("moe_tp", "moe_ep"), ("pp", "moe_ep")):
        for one in layout.groups(first):
            for other in layout.groups(second):
                assert len(set(one) & set(other)) <= 1
    # one group of each kind through a rank reaches every rank, over one another
    reached = {0}
    for kind in ("tp", "pp", "cp"):
        reached = {rank for group in layout.groups(kind) if reached & set(group) for rank in group}
    assert reached == set(range(layout.world_size))


@given(layouts())
def test_experts_stay_in_their_stage(layout: Layout) -> None:
    """A13: peers of expert parallelism are next to each other, a rank's slice of an expert is not."""
    stage = layout.tp_size * layout.cp_size
    for group in layout.groups("moe_ep"):
        assert group == list(range(group[0], group[0] + layout.moe_ep_size))
        assert group[0] // stage == group[-1] // stage
    for group in layout.groups("moe_tp"):
        assert group == list(range(group[0], group[0] + layout.moe_ep_size * len(group), layout.moe_ep_size))


@given(layouts(), st.integers(1, 9))
def test_places_are_distinct_and_lie_block_by_block(layout: Layout, per_node: int) -> None:
    places = [layout.place(rank, per_node) for rank in range(layout.world_size)]
    assert len({(place.tp_rank, place.pp_rank, place.cp_rank) for place in places}) == layout.world_size
    copies = layout.cp_size if layout.moe_world_size == layout.tp_size else 1
    experts = Counter((place.pp_rank, place.moe_tp_rank, place.moe_ep_rank) for place in places)
    assert set(experts.values()) == {copies}
    assert len(experts) * copies == layout.world_size
    nodes = [place.node for place in places]
    assert nodes == sorted(nodes)
    for place in places:
        assert (place.node * per_node + place.gpu, 0 <= place.gpu < per_node) == (place.rank, True)
        assert 0 <= place.tp_rank < layout.tp_size
        assert 0 <= place.cp_rank < layout.cp_size
        assert 0 <= place.moe_tp_rank < layout.moe_tp_size
        assert 0 <= place.moe_ep_rank < layout.moe_ep_size
        # pipeline stages are outermost
        assert place.pp_rank == place.rank // (layout.tp_size * layout.cp_size)


@pytest.mark.parametrize(
    ("version", "tp_ranks", "cp_ranks", "tp_group"),
    [
        ("1.0.0", [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], [0, 1, 2]),
        ("1.2.1", [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], [0, 1, 2]),
        ("1.3.0", [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [0, 2, 4]),
        (None, [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [0, 2, 4]),
    ],
)
def test_the_order_of_ranks_is_the_version_s(
    version: str | None, tp_ranks: list[int], cp_ranks: list[int], tp_group: list[int]
) -> None:
    """A12: until 1.2 neighbours differ in their tensor rank, since then in their context rank."""
    config = EngineConfig(3, 2, 2, cp_type="HELIX")
    layout = layout_of(config, None if version is None else parse_trtllm_version(version))
    places = [layout.place(rank, 6) for rank in range(12)]
    assert [place.tp_rank for place in places] == tp_ranks * 2
    assert [place.cp_rank for place in places] == cp_ranks * 2
    assert layout.groups("tp")[0] == tp_group


@pytest.mark.parametrize(
    ("version", "ranks", "experts"),
    [("1.1.0", 2, [0, 1, 0, 1]), ("1.2.1", 4, [0, 1, 2, 3]), ("1.3.0", 4, [0, 1, 2, 3]), (None, 4, [0, 1, 2, 3])],
)
def test_since_1_2_helix_shares_experts_out_over_its_context_ranks(
    version: str | None, ranks: int, experts: list[int]
) -> None:
    config = EngineConfig(2, cp_size=2, cp_type="HELIX", moe_ep_size=ranks)
    layout = layout_of(config, None if version is None else parse_trtllm_version(version))
    assert (layout.moe_world_size, layout.multiplies_out, layout.dense_tp_size) == (ranks, True, 4)
    assert [layout.place(rank, 4).moe_ep_rank for rank in range(4)] == experts
    # the engine's default kind does in no version
    ulysses = layout_of(EngineConfig(2, cp_size=2), None if version is None else parse_trtllm_version(version))
    assert ulysses.moe_world_size == 2


@given(st.integers(1, 8), *[st.none() | st.integers(1, 9)] * 3)
def test_sizes_that_cannot_be_are_still_sizes(
    tp: int, moe_tp: int | None, moe_ep: int | None, moe_cluster: int | None
) -> None:
    layout = layout_of(EngineConfig(tp, moe_tp_size=moe_tp, moe_ep_size=moe_ep, moe_cluster_size=moe_cluster))
    assert layout.moe_ep_size >= 1
    assert layout.moe_tp_size >= (1 if layout.multiplies_out else 0)


def test_smart_router_clusters_are_between_slices_and_shares() -> None:
    layout = Layout(8, moe_tp_size=2, moe_ep_size=1, moe_cluster_size=4)
    assert [layout.place(rank, 8).moe_tp_rank for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.groups("moe_tp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("moe_ep") == [[rank] for rank in range(8)]


@pytest.mark.parametrize(
    ("tp", "pp", "nodes", "per_node", "gpu", "leaves"),
    [
        (8, 1, 1, 8, None, False),
        (16, 1, 2, 8, None, True),
        (8, 2, 2, 8, None, False),
        (4, 4, 2, 8, None, False),
        # groups of 3 on nodes of 8: the third one is on both
        (3, 8, 3, 8, None, True),
        (16, 1, 4, 4, "gb200", False),
        (72, 1, 18, 4, "gb200", False),
        (80, 1, 20, 4, "gb200", True),
        (16, 1, 2, 8, "b200", True),
    ],
)
def test_groups_that_leave_nvlink(tp: int, pp: int, nodes: int, per_node: int, gpu: str | None, leaves: bool) -> None:
    assert Layout(tp, pp).leaves_nvlink(Cluster(nodes, per_node, gpu)) is leaves
