# SPDX-License-Identifier: Apache-2.0
"""The planner: every legal layout and no other, in the order that it promises, written down so that the engine gets just that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_config import EngineConfig, KvCache, Speculative
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.engine_yaml import engine_yaml
from dynamo_mpi.layout.finding import Severity, errors
from dynamo_mpi.layout.layout import Cluster, LayoutSpec, short_name
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.planner import Plan, nearest, plan, workable_sizes
from dynamo_mpi.layout.report import check_worker
from dynamo_mpi.layout.rules.registry import layout_findings
from tests.unit.model_zoo import QUANT_FILES, ZOO

MAVERICK = "Llama-4-Maverick-17B-128E"
R1 = "DeepSeek-R1"
LLAMA_70B = "Llama-3.1-70B"
NEXT = "Qwen3-Next-80B-A3B"
ROLES = ("agg", "prefill", "decode")


@cache
def shape_of(model: str) -> ModelShape:
    quant_file = json.dumps(QUANT_FILES[model]) if model in QUANT_FILES else None
    return parse_model_shape(json.dumps(ZOO[model]), "config.json", quant_file)


def worker(model: str, nodes: int, gpus: int, role: str = "agg", gpu: str | None = None, **config: Any) -> LayoutSpec:
    return LayoutSpec(shape_of(model), EngineConfig(**config), Cluster(nodes, gpus, gpu), role)


def names(plans: list[Plan]) -> list[str]:
    return [short_name(made.subject) for made in plans]


# what is known of some models


def test_llama_70b_on_two_nodes_is_a_stage_on_each() -> None:
    found = plan(worker(LLAMA_70B, 2, 8, gpu="h100"))
    assert names(found)[0] == "TP8/PP2"
    # 16 ranks share 8 KV heads, over the nodes
    assert [short_name(made.subject) for made in found if made.fits][-1] == "TP16"
    assert {short_name(made.subject): made.kv_copies for made in found}["TP16"] == 2
    # a dense model isn't for attention DP (C1)
    assert not any(made.layout.enable_attention_dp for made in found)


def test_maverick_on_sixteen_gpus_has_no_plain_tp_16() -> None:
    found = plan(worker(MAVERICK, 2, 8, gpu="h200"))
    assert names(found)[:2] == ["TP16/EP16 with attention DP", "TP8/EP8/PP2"]
    assert not any(made.layout.tp_size == 16 and not made.layout.enable_attention_dp for made in found)
    assert "only experts over nodes" in found[0].reasons


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 16), (16, 128)])
@pytest.mark.parametrize("role", ROLES)
def test_deepseek_r1_shares_its_experts_over_all_gpus(nodes: int, ranks: int, role: str) -> None:
    found = plan(worker(R1, nodes, 8, role, "h200"))
    assert names(found)[0] == f"TP{ranks}/EP{ranks} with attention DP"
    assert found[0].kv_copies == 1
    assert any(made.layout.is_helix for made in found) == (role == "decode")


def test_a_latent_is_copied_to_every_tensor_rank() -> None:
    copies = {short_name(made.subject): made.kv_copies for made in plan(worker(R1, 1, 8))}
    assert (copies["TP8/EP8"], copies["TP8/EP8 with attention DP"], copies["TP4/EP4/PP2"]) == (8, 1, 4)


def test_what_does_not_fit_comes_last() -> None:
    found = plan(worker(R1, 1, 8, gpu="h100"))
    assert {made.fits for made in found} == {False}
    assert all("does not fit" in made.reasons for made in found)
    fits = [made.fits for made in plan(worker("Qwen3-235B-A22B", 1, 8, gpu="h100"))]
    assert fits == sorted(fits, key=lambda each: {True: 0, None: 1, False: 2}[each])


def test_where_the_gpu_is_not_known_nothing_is_said_of_fitting() -> None:
    assert {made.fits for made in plan(worker(R1, 1, 8))} == {None}


def test_smollm2_on_other_numbers_than_three() -> None:
    assert names(plan(worker("SmolLM2-135M", 1, 3))) == ["TP3", "TP1/PP3"]
    assert names(plan(worker("SmolLM2-135M", 1, 4))) == ["TP1/PP4"]


def test_more_gpus_than_layers_and_heads_have_no_layout() -> None:
    few = replace(shape_of("SmolLM2-135M"), num_layers=2)
    # heads can't be shared out, and neither attention DP nor context ranks stand in for that
    assert plan(LayoutSpec(few, EngineConfig(), Cluster(1, 7))) == []
    # with experts or a latent attention DP does
    moe = replace(shape_of("Mixtral-8x7B"), num_layers=2)
    found = plan(LayoutSpec(moe, EngineConfig(), Cluster(1, 7)))
    assert names(found) == ["TP7 with attention DP"]


@pytest.mark.parametrize("model", list(ZOO))
def test_attention_dp_is_planned_for_experts_and_latents_alone(model: str) -> None:
    shape = shape_of(model)
    suits = shape.experts is not None or shape.latent is not None
    assert shape.suits_attention_dp == suits
    assert any(made.layout.enable_attention_dp for made in plan(worker(model, 1, 8))) == suits


def test_a_latent_alone_suits_attention_dp() -> None:
    dense = replace(shape_of(R1), experts=None, layers=None)
    assert dense.suits_attention_dp
    assert "TP8 with attention DP" in names(plan(LayoutSpec(dense, EngineConfig(), Cluster(1, 8))))


# what holds for every plan

CLUSTERS = [
    (MAVERICK, 2, 8, None),
    (MAVERICK, 1, 6, None),
    (R1, 2, 8, "h200"),
    (R1, 4, 4, "gb200"),
    (LLAMA_70B, 3, 4, None),
    ("Qwen3-32B-FP8", 2, 8, "h100"),
    ("Phi-4", 1, 5, "h100"),
    ("SmolLM2-135M", 1, 6, None),
    ("gpt-oss-120b", 2, 4, "h100"),
    (NEXT, 4, 8, "h200"),
    ("DeepSeek-V4-Pro", 4, 8, "b300"),
    ("DeepSeek-V3.2", 2, 8, None),
    ("Nemotron-3-Nano-30B-A3B", 2, 8, "h100"),
    ("MiMo-V2-Flash", 1, 8, None),
    ("Mixtral-8x7B", 1, 7, None),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("model", "nodes", "gpus", "gpu"), CLUSTERS)
def test_every_layout_is_legal_and_uses_every_gpu(
    model: str, nodes: int, gpus: int, gpu: str | None, role: str
) -> None:
    found = plan(worker(model, nodes, gpus, role, gpu))
    assert len(set(names(found))) == len(found) > 0
    for made in found:
        assert made.layout.world_size == nodes * gpus == made.subject.cluster.world_size
        assert errors(layout_findings(made.subject)) == []
        assert list(made.findings) == layout_findings(made.subject)
        assert made.reasons


def over_nodes(subject: LayoutSpec) -> bool:
    """Is some tensor-parallel group, with its context ranks, on two nodes? Under attention DP whole experts may be."""
    layout = subject.layout
    if layout.enable_attention_dp and layout.moe_tp_size == 1 and subject.shape.experts is not None:
        return False
    reach = 72 if subject.cluster.gpu == "gb200" else subject.cluster.gpus_per_node
    stages = [
        range(first, first + layout.tp_size * layout.cp_size)
        for first in range(0, layout.world_size, layout.tp_size * layout.cp_size)
    ]
    return any(len({rank // reach for rank in stage}) > 1 for stage in stages)


def promised_order(made: Plan) -> tuple[float, ...]:
    """Smaller is better: fits, documented (HELIX), TP inside a node, warnings, copies of the KV cache, pipeline stages, memory left."""
    room = made.memory.world_tokens if made.memory is not None else None
    return (
        {True: 0, None: 1, False: 2}[made.fits],
        any(finding.rule == "F13" for finding in layout_findings(made.subject)),
        over_nodes(made.subject),
        sum(
            finding.severity is Severity.WARNING and finding.rule in ("A14", "D6")
            for finding in layout_findings(made.subject)
        ),
        made.kv_copies,
        made.layout.pp_size,
        -(room or 0),
    )


@pytest.mark.parametrize(
    ("model", "nodes", "gpus", "gpu", "documented"),
    [
        ("DeepSeek-V3.2", 2, 4, "gb200", False),
        (R1, 1, 8, "h200", False),
        ("Qwen3-32B-FP8", 1, 8, "b200", False),
        (R1, 2, 4, "gb200", True),
        (R1, 1, 8, None, True),
    ],
)
def test_helix_ranks_below_where_it_isnt_documented(
    model: str, nodes: int, gpus: int, gpu: str | None, documented: bool
) -> None:
    found = plan(worker(model, nodes, gpus, "decode", gpu))
    helix = [made for made in found if made.layout.is_helix]
    assert helix != []
    assert any("F13" in [finding.rule for finding in made.findings] for made in helix) is not documented
    assert all(("HELIX isn't documented for it" in made.reasons) is not documented for made in helix)
    if not documented:
        fitting = [made.layout.is_helix for made in found if made.fits is not False]
        assert fitting == sorted(fitting)


def test_helix_with_mtp_ranks_below() -> None:
    subject = worker(R1, 2, 4, "decode", "gb200")
    mtp = replace(subject, config=replace(subject.config, speculative=Speculative("MTP", 1)))
    assert not plan(mtp)[0].layout.is_helix
    assert all(made.findings for made in plan(mtp) if made.layout.is_helix)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("model", "nodes", "gpus", "gpu"), CLUSTERS)
def test_the_order_is_the_promised_one(model: str, nodes: int, gpus: int, gpu: str | None, role: str) -> None:
    found = [promised_order(made) for made in plan(worker(model, nodes, gpus, role, gpu))]
    assert found == sorted(found)


def every_config(subject: LayoutSpec) -> Iterator[EngineConfig]:
    """Try each number for each size. Context ranks are for decode workers without a state, up to 16, and not under
    attention DP, which is for models with experts or a latent."""
    world = subject.cluster.world_size
    helix = subject.role == "decode" and subject.shape.state_space is None
    experts = subject.shape.experts is not None
    suits = experts or subject.shape.latent is not None
    sizes = range(1, world + 1)
    for cp in sizes if helix else (1,):
        for pp in sizes:
            for tp in sizes:
                if tp * pp * cp != world or cp > 16:
                    continue
                for ep in sizes if experts else (1,):
                    for moe_tp in sizes if experts else (tp * cp,):
                        for attention_dp in (False, True) if tp > 1 and cp == 1 and suits else (False,):
                            yield EngineConfig(
                                tp,
                                pp,
                                cp,
                                cp_type="HELIX" if cp > 1 else None,
                                moe_tp_size=moe_tp,
                                moe_ep_size=ep,
                                enable_attention_dp=attention_dp,
                            )


@pytest.mark.parametrize("role", ["agg", "decode"])
@pytest.mark.parametrize(
    ("model", "nodes", "gpus"),
    [
        (MAVERICK, 2, 8),
        (MAVERICK, 1, 6),
        (R1, 2, 8),
        (LLAMA_70B, 2, 8),
        ("Phi-4", 2, 5),
        ("SmolLM2-135M", 1, 9),
        ("gpt-oss-120b", 1, 8),
        (NEXT, 2, 8),
        ("DeepSeek-V4-Flash", 2, 8),
        ("Qwen3-32B-FP8", 2, 8),
        ("MiMo-V2-Flash", 1, 8),
    ],
)
def test_no_legal_layout_is_missing(model: str, nodes: int, gpus: int, role: str) -> None:
    subject = worker(model, nodes, gpus, role)
    legal = set()
    for config in every_config(subject):
        candidate = replace(subject, config=config)
        if errors(layout_findings(candidate)) == []:
            legal.add(candidate.layout)
    assert {made.layout for made in plan(subject)} == legal


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("model", "nodes", "gpus", "gpu"), CLUSTERS)
def test_what_is_written_down_is_what_was_planned(
    model: str, nodes: int, gpus: int, gpu: str | None, role: str
) -> None:
    for made in plan(worker(model, nodes, gpus, role)):
        text = engine_yaml(made.subject, model)
        config = merge(EngineLayers(yaml_text=text)).config
        back = LayoutSpec(made.subject.shape, config, made.subject.cluster, role)
        assert back.layout == made.layout
        report = check_worker(back)
        assert report.ok, (short_name(back), errors(report.findings))
        assert not any(finding.rule == "H" for finding in report.findings)
        assert text.startswith(f"# {model}: {short_name(made.subject)}, ")


def test_what_was_asked_besides_sizes_is_kept() -> None:
    cache_config = KvCache(dtype="fp8", tokens_per_block=64)
    asked = worker(R1, 2, 8, "decode", max_num_tokens=1024, kv_cache=cache_config, tp_size=3, moe_tp_size=5)
    for made in plan(asked):
        config = made.subject.config
        assert (config.max_num_tokens, config.kv_cache, config.moe_tp_size) == (1024, cache_config, None)
        if made.layout.is_helix:
            assert "cp_config: {cp_type: HELIX, tokens_per_block: 64}" in engine_yaml(made.subject, R1)


# nearest


@pytest.mark.parametrize(
    ("model", "nodes", "gpus", "config", "first"),
    [
        (MAVERICK, 2, 8, {"tp_size": 16}, "TP16/EP16 with attention DP"),
        (MAVERICK, 2, 8, {"tp_size": 16, "moe_ep_size": 16}, "TP16/EP16 with attention DP"),
        ("Phi-4", 1, 8, {"tp_size": 8}, "TP2/PP4"),
        (R1, 1, 8, {"tp_size": 8, "moe_ep_size": 16}, "TP8/EP8"),
        (LLAMA_70B, 2, 8, {"tp_size": 8}, "TP8/PP2"),
        ("Qwen3-32B-FP8", 2, 8, {"tp_size": 16}, "TP8/PP2"),
    ],
)
def test_the_nearest_layout(model: str, nodes: int, gpus: int, config: dict[str, Any], first: str) -> None:
    assert names(nearest(worker(model, nodes, gpus, **config)))[0] == first


@pytest.mark.parametrize(("model", "nodes", "gpus", "gpu"), CLUSTERS)
def test_the_nearest_are_some_of_all(model: str, nodes: int, gpus: int, gpu: str | None) -> None:
    subject = worker(model, nodes, gpus, "decode", gpu, tp_size=nodes * gpus, moe_ep_size=3)
    everything = plan(subject)
    for count in (0, 1, 3, 1000):
        found = nearest(subject, count)
        assert len(found) == min(count, len(everything))
        assert {made.layout for made in found} <= {made.layout for made in everything}
    # a legal one is nearest to itself
    for made in everything:
        if made.fits is not False:
            assert nearest(made.subject, 1)[0].layout == made.layout


def test_what_does_not_fit_is_not_near() -> None:
    found = nearest(worker("Llama-3.1-405B", 2, 8, gpu="h100", tp_size=1, pp_size=16), 100)
    fits = [made.fits is False for made in found]
    assert fits == sorted(fits)


# sizes


@pytest.mark.parametrize(
    ("model", "nodes", "gpus"),
    [("SmolLM2-135M", 1, 8), (MAVERICK, 1, 7), ("Phi-4", 2, 8), (R1, 3, 8), (LLAMA_70B, 5, 4)],
)
def test_workable_sizes_are_the_largest_with_a_plan(model: str, nodes: int, gpus: int) -> None:
    subject = worker(model, nodes, gpus)
    expected = []
    for ranks in range(1, nodes * gpus):
        if ranks > gpus and ranks % gpus:
            continue
        cluster = Cluster(1, ranks) if ranks <= gpus else Cluster(ranks // gpus, gpus)
        if plan(replace(subject, cluster=cluster)):
            expected.append(ranks)
    assert workable_sizes(subject) == expected[-3:]
    assert workable_sizes(subject, 1) == expected[-1:]


def test_one_gpu_has_no_smaller_size() -> None:
    assert workable_sizes(worker(LLAMA_70B, 1, 1)) == []


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.builds(
        ModelShape,
        st.just("M"),
        st.none() | st.integers(1, 48),
        st.none() | st.integers(1, 16),
        num_layers=st.none() | st.integers(1, 9),
        intermediate_size=st.none() | st.integers(1, 256),
    ),
    st.sampled_from(ROLES),
)
def test_any_model_is_planned(nodes: int, gpus: int, shape: ModelShape, role: str) -> None:
    subject = LayoutSpec(shape, EngineConfig(), Cluster(nodes, gpus), role)
    found = plan(subject)
    assert all(made.layout.world_size == nodes * gpus for made in found)
    assert [made.order for made in found] == sorted(made.order for made in found)
    # a pipeline stage for each GPU is always possible, as long as there are layers
    if shape.num_layers is not None and shape.num_layers >= nodes * gpus:
        assert any(made.layout.pp_size == nodes * gpus for made in found)
