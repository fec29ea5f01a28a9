# SPDX-License-Identifier: Apache-2.0
"""Rules about heads, layers and ranks, on models whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.divisibility import legal_tp_sizes
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.finding import Finding, Severity, errors, render
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import CompressedAttention, ModelShape
from dynamo_mpi.layout.rules.registry import all_findings, layout_findings
from tests.unit.models import DEEPSEEK, LLAMA_4, PHI_4, SMOLLM2

LEGAL = {
    "llama4": (LLAMA_4, (1, 2, 4, 8, 40)),
    "phi4": (PHI_4, (1, 2, 5, 10, 20, 40)),
    "smollm2": (SMOLLM2, (1, 3, 9)),
    "deepseek": (DEEPSEEK, (1, 2, 4, 8, 16, 32, 64, 128)),
}


def shape_of(config: dict[str, Any]) -> ModelShape:
    return parse_model_shape(json.dumps(config), "config.json")


def shape_with(heads: int | None, kv_heads: int | None) -> ModelShape:
    return ModelShape("M", heads, kv_heads)


def judge(
    shape: ModelShape, config: EngineConfig, world_size: int | None = None, role: str = "agg", launched: bool = False
) -> list[Finding]:
    cluster = Cluster(1, world_size or config.world_size)
    return errors(layout_findings(LayoutSpec(shape, config, cluster, role, launched=launched)))


def findings_of(config: dict[str, Any], layout: EngineConfig, role: str = "agg") -> list[Finding]:
    return judge(shape_of(config), layout, role=role)


@pytest.mark.parametrize("model", list(LEGAL))
def test_legal_sizes_of_known_models(model: str) -> None:
    config, legal = LEGAL[model]
    assert legal_tp_sizes(shape_of(config)) == legal


@pytest.mark.parametrize("model", list(LEGAL))
def test_every_size_is_accepted_or_refused_as_the_list_says(model: str) -> None:
    config, legal = LEGAL[model]
    for tp_size in range(1, 130):
        findings = [finding for finding in findings_of(config, EngineConfig(tp_size)) if finding.rule != "E1"]
        assert (findings == []) == (tp_size in legal), (model, tp_size)
        for finding in findings:
            assert ", ".join(map(str, legal)) in finding.fix


def test_advice_leaves_out_what_another_rule_would_refuse() -> None:
    """SmolLM2's 9 heads allow 9 ranks, its MLP of 1536 doesn't."""
    (finding, _) = findings_of(SMOLLM2, EngineConfig(2))
    assert finding.fix.startswith("set tensor_parallel_size to one of 1, 3 (B11: heads alone allow 1, 3, 9)")
    assert [finding.rule for finding in findings_of(SMOLLM2, EngineConfig(9))] == ["E1"]


@pytest.mark.parametrize(
    ("model", "tp_size", "rules"),
    [
        (SMOLLM2, 2, ["B1", "B3"]),
        (PHI_4, 4, ["B3"]),
        (PHI_4, 8, ["B3"]),
        (PHI_4, 16, ["B1", "B3"]),
        (LLAMA_4, 5, ["B3"]),
        (LLAMA_4, 16, ["B1"]),
        (LLAMA_4, 80, ["B1"]),
        (DEEPSEEK, 3, ["B2"]),
        (DEEPSEEK, 256, ["B2"]),
    ],
)
def test_the_rule_that_is_broken_is_named(model: dict[str, Any], tp_size: int, rules: list[str]) -> None:
    assert [finding.rule for finding in findings_of(model, EngineConfig(tp_size))] == rules


@pytest.mark.parametrize("model", [SMOLLM2, PHI_4, LLAMA_4, DEEPSEEK])
def test_attention_data_parallelism_lifts_the_head_rules(model: dict[str, Any]) -> None:
    for tp_size in (2, 4, 16):
        assert findings_of(model, EngineConfig(tp_size, enable_attention_dp=True)) == []


def test_attention_data_parallelism_still_divides_heads_over_context_ranks() -> None:
    config = EngineConfig(4, cp_size=2, cp_type="HELIX", enable_attention_dp=True)
    (finding,) = findings_of(SMOLLM2, config, role="decode")
    assert finding.rule == "B1"
    assert "cp_size = 2" in finding.message
    assert "context_parallel_size" in finding.fix
    config = EngineConfig(4, cp_size=3, cp_type="HELIX", enable_attention_dp=True)
    assert [finding.rule for finding in findings_of(SMOLLM2, config, role="decode")] == []


def test_context_parallelism_narrows_the_legal_sizes() -> None:
    assert legal_tp_sizes(shape_of(LLAMA_4), cp_size=2) == (1, 2, 4)
    assert legal_tp_sizes(shape_of(LLAMA_4), cp_size=3) == ()
    (finding,) = findings_of(LLAMA_4, EngineConfig(8, cp_size=2, cp_type="HELIX"), role="decode")
    assert (finding.rule, "tp_size x cp_size = 16" in finding.message) == ("B1", True)
    assert "one of 1, 2, 4" in finding.fix


@pytest.mark.parametrize("pp_size", [1, 2, 7])
def test_pipeline_stages_leave_heads_alone(pp_size: int) -> None:
    assert findings_of(LLAMA_4, EngineConfig(8, pp_size=pp_size)) == []


@pytest.mark.parametrize(("pp_size", "rules"), [(1, []), (30, []), (31, ["F3"])])
def test_every_pipeline_stage_needs_a_layer(pp_size: int, rules: list[str]) -> None:
    findings = findings_of(SMOLLM2, EngineConfig(3, pp_size=pp_size))
    assert [finding.rule for finding in findings] == rules
    assert all("30 or less" in finding.fix for finding in findings)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 250))
def test_the_world_is_exactly_the_product(tp_size: int, pp_size: int, world_size: int) -> None:
    config = EngineConfig(tp_size, pp_size)
    findings = judge(shape_with(None, None), config, world_size, launched=True)
    if world_size == tp_size * pp_size:
        assert findings == []
    else:
        (finding,) = findings
        assert finding.rule == "A1"
        assert f"there are {world_size}" in finding.message
        assert f"start {counted(config.world_size, 'rank')}" in finding.fix


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 50))
def test_before_a_launch_a_layout_may_take_a_part_of_one_node(
    tp_size: int, pp_size: int, nodes: int, gpus: int
) -> None:
    config = EngineConfig(tp_size, pp_size)
    found = layout_findings(LayoutSpec(shape_with(None, None), config, Cluster(nodes, gpus)))
    reported = [(finding.rule, finding.severity) for finding in found if finding.rule == "A1"]
    if config.world_size == nodes * gpus:
        assert reported == []
    elif nodes == 1 and config.world_size < gpus:
        assert reported == [("A1", Severity.INFO)]
    else:
        assert reported == [("A1", Severity.ERROR)]


def test_a_wrong_world_comes_before_a_wrong_split() -> None:
    rules = [finding.rule for finding in judge(shape_of(SMOLLM2), EngineConfig(2), 3, launched=True)]
    assert rules == ["A1", "B1", "B3"]


@given(st.integers(1, 160), st.integers(1, 160) | st.none(), st.integers(1, 4))
def test_legal_sizes_against_the_definition(heads: int, kv_heads: int | None, cp_size: int) -> None:
    shape = shape_with(heads, kv_heads)
    expected = tuple(
        tp
        for tp in range(1, 400)
        if heads % (tp * cp_size) == 0 and (kv_heads is None or kv_heads % tp == 0 or tp % kv_heads == 0)
    )
    assert legal_tp_sizes(shape, cp_size) == expected
    for tp_size in range(1, 20):
        config = EngineConfig(tp_size, cp_size=cp_size, cp_type="HELIX" if cp_size > 1 else None)
        assert (judge(shape, config, role="decode") == []) == (tp_size in expected)


def test_a_model_that_does_not_say_its_heads_is_not_judged_by_them() -> None:
    assert legal_tp_sizes(shape_with(None, None)) is None
    assert judge(shape_with(None, None), EngineConfig(7)) == []


@given(
    st.builds(
        ModelShape,
        st.just("M"),
        *[st.none() | st.integers(1, 64)] * 8,
        compressed=st.none() | st.builds(CompressedAttention, st.none(), st.none(), st.integers(1, 8)),
        encoder_decoder=st.booleans(),
        dtype=st.none() | st.sampled_from(["bfloat16", "odd"]),
    ),
    st.builds(
        EngineConfig,
        st.integers(1, 2**31 - 1),
        st.integers(1, 5000),
        st.integers(1, 64),
        st.booleans(),
        moe_ep_size=st.none() | st.integers(1, 999),
        cp_type=st.none() | st.sampled_from(["HELIX", "STAR", "ODD"]),
        pp_partition=st.none() | st.lists(st.integers(0, 9), max_size=5).map(tuple),
    ),
    st.sampled_from(["agg", "prefill", "decode"]),
    st.sampled_from([None, "h100", "gb10"]),
)
def test_no_rule_trips_over_what_it_is_given(
    shape: ModelShape, config: EngineConfig, role: str, gpu: str | None
) -> None:
    for finding in all_findings(LayoutSpec(shape, config, Cluster(2, 8, gpu), role)):
        assert finding.rule and finding.message and not finding.message.endswith(".")


def test_findings_are_rendered_errors_first_and_complete() -> None:
    info = Finding("X1", Severity.INFO, "by the way")
    error = Finding("X2", Severity.ERROR, "wrong", found="a", expected="b", fix="c\nd")
    text = render([info, error])
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "error X2: wrong",
        "info X1: by the way",
    ]
    # what is only good to know takes one line, with what to do
    reported = Finding("X1", Severity.INFO, "by the way", found="a", expected="b", fix="do c")
    assert render([reported]) == "info X1: by the way (do c)"
    lines = [line.split() for line in text.splitlines()[1:5]]
    assert lines == [["found:", "a"], ["expected:", "b"], ["fix:", "c"], ["d"]]
    assert errors([info, error]) == [error]
    assert json.loads(json.dumps(error.as_json())) == {
        "rule": "X2",
        "severity": "error",
        "message": "wrong",
        "found": "a",
        "needed": "b",
        "fix": "c\nd",
    }
