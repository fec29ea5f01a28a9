# SPDX-License-Identifier: Apache-2.0
"""What a user probably meant, and how layouts are called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo_mpi.layout.engine_config import EngineConfig, Transceiver
from dynamo_mpi.layout.finding import errors
from dynamo_mpi.layout.layout import Cluster, LayoutSpec, cluster_for, short_name
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.report import check_worker
from dynamo_mpi.layout.rules.registry import layout_findings
from dynamo_mpi.layout.suggestions import meant_by_more_experts_than_ranks, other_shapes, suggestions
from tests.unit.model_zoo import ZOO

MAVERICK = "Llama-4-Maverick-17B-128E"
R1 = "DeepSeek-R1"


def worker(model: str, nodes: int, gpus: int, role: str = "agg", gpu: str | None = None, **config: Any) -> LayoutSpec:
    shape = parse_model_shape(json.dumps(ZOO[model]), "config.json")
    return LayoutSpec(shape, EngineConfig(**config), Cluster(nodes, gpus, gpu), role)


def names(subject: LayoutSpec) -> list[str]:
    return [short_name(other) for other in meant_by_more_experts_than_ranks(subject)]


@pytest.mark.parametrize(
    ("model", "tp", "ep", "expected"),
    [
        (
            R1,
            8,
            16,
            [
                "TP16/EP16 with attention DP",
                "TP8/EP8/PP2",
                "TP8 x CP2 helix/EP16 on a decode worker",
                "TP16/EP16",
            ],
        ),
        (
            R1,
            8,
            32,
            [
                "TP32/EP32 with attention DP",
                "TP8/EP8/PP4",
                "TP8 x CP4 helix/EP32 on a decode worker",
                "TP32/EP32",
            ],
        ),
        # 40 heads: 16 context and tensor ranks can't share them, nor can 16 tensor ranks
        (MAVERICK, 8, 16, ["TP16/EP16 with attention DP", "TP8/EP8/PP2"]),
        (
            MAVERICK,
            4,
            8,
            ["TP8/EP8 with attention DP", "TP4/EP4/PP2", "TP4 x CP2 helix/EP8 on a decode worker", "TP8/EP8"],
        ),
        # 128 experts can't be divided by 24
        (MAVERICK, 8, 24, ["TP8/EP8/PP3"]),
        # what fits needs no words
        (R1, 8, 8, []),
        (R1, 16, 8, []),
        # not even a multiple
        (R1, 8, 12, []),
    ],
)
def test_more_experts_parallel_than_ranks(model: str, tp: int, ep: int, expected: list[str]) -> None:
    assert names(worker(model, 1, 8, tp_size=tp, moe_ep_size=ep)) == expected


@pytest.mark.parametrize("model", [R1, MAVERICK, "Qwen3-235B-A22B", "gpt-oss-120b", "Mixtral-8x7B", "Kimi-K2"])
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 4), (2, 8), (1, 3)])
def test_what_was_meant_is_legal_and_has_its_gpus(model: str, nodes: int, gpus: int) -> None:
    for ep in (2, 3, 4, 6, 8, 16, 32, 64, 128):
        for tp in (1, 2, 3, 4, 8):
            subject = worker(model, nodes, gpus, tp_size=tp, moe_ep_size=ep, gpus_per_node=gpus)
            for other in meant_by_more_experts_than_ranks(subject):
                assert errors(layout_findings(other)) == []
                assert other.layout.world_size == other.cluster.world_size == ep
                assert other.cluster.gpus_per_node == min(gpus, ep) == other.config.gpus_per_node
                assert other.role == ("decode" if other.layout.is_helix else "agg")


def test_stages_and_context_ranks_that_are_there_already_stay() -> None:
    subject = worker(R1, 2, 8, tp_size=8, pp_size=2, moe_ep_size=16)
    (other,) = meant_by_more_experts_than_ranks(subject)
    assert (short_name(other), other.cluster.nodes) == ("TP16/EP16/PP2", 4)


def test_the_role_stays_where_it_can() -> None:
    found = meant_by_more_experts_than_ranks(worker(R1, 1, 8, "prefill", tp_size=8, moe_ep_size=16))
    assert {other.role for other in found if not other.layout.is_helix} == {"prefill"}
    assert {other.role for other in found if other.layout.is_helix} == {"decode"}


def advice(subject: LayoutSpec) -> str:
    return next(finding.fix for finding in check_worker(subject).findings if finding.rule == "A2")


def test_advice_on_expert_parallelism() -> None:
    fix = advice(worker(R1, 1, 8, tp_size=8, moe_ep_size=16))
    assert fix.startswith("on 16 ranks: TP16/EP16 with attention DP, or TP8/EP8/PP2, or TP8 x CP2 helix/EP16")
    assert fix.endswith(
        "on these 8 ranks set moe_expert_parallel_size to one of 1, 2, 4, 8, and leave moe_tensor_parallel_size out"
    )
    # sizes that experts can't be divided by aren't named
    fix = advice(worker("Mixtral-8x7B", 2, 8, tp_size=16, moe_ep_size=5))
    assert fix == "set moe_expert_parallel_size to one of 1, 2, 4, 8, and leave moe_tensor_parallel_size out"


@pytest.mark.parametrize(
    ("model", "nodes", "gpu", "config"),
    [
        (MAVERICK, 2, "h200", {"tp_size": 16}),
        (MAVERICK, 1, "h100", {"tp_size": 8}),
        (R1, 1, "h200", {"tp_size": 8, "moe_ep_size": 16}),
        (R1, 1, "h100", {"tp_size": 4, "moe_ep_size": 4}),
        ("Phi-4", 1, None, {"tp_size": 8}),
        ("Qwen3-32B-FP8", 2, "h100", {"tp_size": 16}),
        ("Llama-3.1-405B", 1, "h100", {"tp_size": 8}),
    ],
)
def test_what_is_offered_passes_every_rule(model: str, nodes: int, gpu: str | None, config: dict[str, Any]) -> None:
    report = check_worker(worker(model, nodes, 8, gpu=gpu, **config))
    assert not report.ok
    assert report.nearest
    for other in report.nearest:
        well(report.subject, other)


def well(asked: LayoutSpec, other: LayoutSpec) -> None:
    """What is offered passes; a decode worker offered to another role alone still must be given a transceiver."""
    checked = check_worker(other)
    broken = {finding.rule for finding in errors(checked.findings)}
    assert broken <= (set() if other.role == asked.role else {"I6"}), (short_name(other), broken)
    assert checked.ok or other.role != asked.role
    assert checked.memory is None or (checked.memory.weights_fit and checked.memory.fits is not False)
    assert other.layout.world_size == other.cluster.world_size
    assert (other.cluster.gpu, other.shape) == (asked.cluster.gpu, asked.shape)


WRONG: tuple[dict[str, Any], ...] = (
    {"tp_size": 3},
    {"tp_size": 16},
    {"tp_size": 8, "moe_ep_size": 16},
    {"tp_size": 8, "pp_size": 100},
    {"tp_size": 2, "moe_tp_size": 4},
    {"tp_size": 4, "cp_size": 2, "cp_type": "RING"},
)


@pytest.mark.parametrize("model", list(ZOO))
def test_everything_that_is_offered_works(model: str) -> None:
    offered = 0
    for gpu, role, nodes in ((None, "agg", 1), ("h100", "agg", 1), ("b200", "decode", 2), ("l40s", "prefill", 1)):
        for config in WRONG:
            transceiver = None if role == "agg" else Transceiver("UCX")
            asked = worker(model, nodes, 8, role, gpu, transceiver=transceiver, **config)
            report = check_worker(asked)
            layouts = [(other.layout, other.role, other.cluster) for other in report.nearest]
            assert len(set(layouts)) == len(layouts)
            about_layout = [f for f in errors(report.findings) if not f.rule.startswith(("H", "I", "G"))]
            assert about_layout or not report.nearest
            for other in report.nearest:
                well(asked, other)
            offered += len(layouts)
    assert offered


def test_where_no_layout_fits_more_gpus_are_offered() -> None:
    (other,) = suggestions(worker(MAVERICK, 1, 8, gpu="h100", tp_size=8))
    assert (other.cluster.nodes, other.cluster.gpu) == (2, "h100")


@pytest.mark.parametrize(
    ("gpu", "nodes", "expected"),
    # 756 GiB of weights
    [("h200", 1, 1), ("h100", 1, 2), ("l40s", 1, 4), ("l40s", 2, 4), ("l40s", 3, 3), ("l40s", 9, 9)],
)
def test_as_few_more_as_are_needed(gpu: str, nodes: int, expected: int) -> None:
    found = suggestions(worker("Llama-3.1-405B", nodes, 8, gpu=gpu, tp_size=8 * nodes))
    assert {other.cluster.nodes for other in found} == {expected}


@pytest.mark.parametrize(("nodes", "expected"), [(4, {16}), (3, {12}), (5, set()), (9, set())])
def test_sixteen_nodes_are_the_most_that_is_offered(nodes: int, expected: set[int]) -> None:
    # 11 or more of these nodes would do; 4 times 5 are too many, and so are twice 9
    found = suggestions(worker("Llama-3.1-405B", nodes, 1, gpu="h100", tp_size=nodes))
    assert {other.cluster.nodes for other in found} == expected


def test_a_cache_without_room_alone_brings_no_offer() -> None:
    report = check_worker(worker(R1, 1, 8, gpu="h100", tp_size=8, moe_ep_size=8))
    assert report.ok
    assert report.nearest == ()


@pytest.mark.parametrize(
    ("gpu", "role", "config", "rule"),
    [("a100", "agg", {"tp_size": 8, "moe_ep_size": 8}, "G"), (None, "prefill", {"tp_size": 8}, "I6")],
)
def test_what_no_layout_mends_brings_no_offer(gpu: str | None, role: str, config: dict[str, Any], rule: str) -> None:
    report = check_worker(worker(R1, 1, 8, role, gpu, **config))
    assert rule in [finding.rule for finding in errors(report.findings)]
    assert report.nearest == ()


def test_layouts_are_listed_by_the_ranks_they_need() -> None:
    some = [worker(R1, 2, 8, tp_size=16), worker(R1, 1, 8, tp_size=8), worker(R1, 2, 8, tp_size=8, pp_size=2)]
    assert other_shapes(some) == "16 ranks: TP16, or TP8/PP2; on 8 ranks: TP8"
    assert other_shapes([]) == ""


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "TP1"),
        ({"tp_size": 8, "moe_ep_size": 8}, "TP8/EP8"),
        ({"tp_size": 8, "moe_ep_size": 1}, "TP8"),
        ({"tp_size": 8, "pp_size": 2, "moe_ep_size": 8}, "TP8/EP8/PP2"),
        ({"tp_size": 16, "enable_attention_dp": True}, "TP16 with attention DP"),
        (
            {"tp_size": 8, "cp_size": 2, "cp_type": "HELIX", "moe_ep_size": 16},
            "TP8 x CP2 helix/EP16 on a decode worker",
        ),
        ({"tp_size": 2, "cp_size": 2, "cp_type": "RING"}, "TP2 x CP2 ring"),
        ({"tp_size": 2, "cp_size": 2}, "TP2 x CP2 ulysses"),
    ],
)
def test_names(config: dict[str, Any], name: str) -> None:
    assert short_name(worker(R1, 1, 8, **config)) == name


@pytest.mark.parametrize(
    ("world", "per_node", "expected"),
    [(1, 8, (1, 1)), (8, 8, (1, 8)), (5, 8, (1, 5)), (16, 8, (2, 8)), (12, 8, None), (3, 1, (3, 1))],
)
def test_nodes_are_whole_or_one(world: int, per_node: int, expected: tuple[int, int] | None) -> None:
    found = cluster_for(world, per_node, "h100")
    assert (None if found is None else (found.nodes, found.gpus_per_node)) == expected
    assert found is None or found.gpu == "h100"
