# SPDX-License-Identifier: Apache-2.0
"""Rules about experts and attention DP: each of them both ways, on public models; and that no rule of these modules ever raises."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_config import EngineConfig, KvCache, Moe
from dynamo_mpi.layout.engine_layers import EngineLayers, MergedConfig, merge, with_balancer
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.layout.gpus import GPUS
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import (
    AttentionSizes,
    Experts,
    Feed,
    LatentAttention,
    Layer,
    LayerFormats,
    Mixer,
    ModelShape,
    StateSpace,
)
from dynamo_mpi.layout.quantisation import Quantisation, WeightFormat
from dynamo_mpi.layout.rules import architecture, attention_dp, backends, dense, experts
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.unit.model_zoo import ZOO

NVFP4 = {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt", "group_size": 16}}
R1_NVFP4 = ZOO["DeepSeek-R1"] | NVFP4
MIXTRAL = ZOO["Mixtral-8x7B"]


def subject_of(
    model: str | dict[str, Any], engine: dict[str, Any], gpu: str | None = None, version: str | None = None
) -> LayoutSpec:
    config = merge(EngineLayers(yaml_text=json.dumps({"max_num_tokens": 2048} | engine))).config
    shape = parse_model_shape(json.dumps(ZOO[model] if isinstance(model, str) else model), "config.json")
    ranks = config.world_size
    cluster = Cluster(max(ranks // 8, 1), min(ranks, 8), gpu)
    return LayoutSpec(shape, config, cluster, version=None if version is None else parse_trtllm_version(version))


def finding_ids(subject: LayoutSpec) -> list[str]:
    """Return the findings of the modules under test as ``severity rule``."""
    rules = (*experts.RULES, *attention_dp.RULES)
    return [f"{finding.severity.value} {finding.rule}" for rule in rules for finding in rule(subject)]


def only(subject: LayoutSpec, rule: str) -> Finding:
    findings = [f for check in (*experts.RULES, *attention_dp.RULES) for f in check(subject) if f.rule == rule]
    assert len(findings) == 1
    return findings[0]


def ranks(tp: int, ep: int | None = None, **others: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"tensor_parallel_size": tp}
    if ep is not None:
        found["moe_expert_parallel_size"] = ep
    return found | others


def wide(ep: int = 8, **others: Any) -> dict[str, Any]:
    return ranks(ep, ep, enable_attention_dp=True, **others)


def balanced(num_slots: int | None, ep: int = 8, **others: Any) -> dict[str, Any]:
    return wide(ep, moe_config={"load_balancer": {"num_slots": num_slots, **others}})


@pytest.mark.parametrize(
    ("model", "engine", "expected"),
    [
        # D1
        ("Mixtral-8x7B", ranks(8, 8), []),
        ("Mixtral-8x7B", ranks(16, 16), ["error D1"]),
        ("Mixtral-8x7B", ranks(16, 16, moe_config={"backend": "CUTEDSL"}), ["warning D1"]),
        ("Llama-4-Scout-17B-16E", ranks(16, 16), []),
        ("Llama-4-Scout-17B-16E", ranks(32, 32), ["error D1"]),
        ("Llama-3.1-8B", ranks(8, 8), []),
        # D5, D6
        ("DeepSeek-R1", ranks(16), []),
        ("DeepSeek-R1", ranks(32), ["error D6"]),
        ("DeepSeek-R1", ranks(32, 32), []),
        ("Qwen3-30B-A3B", ranks(4), []),
        ("Qwen3-30B-A3B-FP8", ranks(2), []),
        ("Qwen3-30B-A3B-FP8", ranks(4), ["error D6"]),
        ("Qwen3-30B-A3B-FP8", ranks(4, 4), []),
        ("Qwen3-235B-A22B-FP8", ranks(8, 2), []),
        ("gpt-oss-120b", ranks(1), []),
        ("gpt-oss-120b", ranks(4), ["warning D6"]),
        ("gpt-oss-120b", ranks(4, 4), []),
        ("Kimi-K2.5", ranks(32), []),
        ("Kimi-K2.5", ranks(128), ["warning D6"]),
        (MIXTRAL | {"intermediate_size": 14337}, ranks(2), ["error D5"]),
        (MIXTRAL | {"intermediate_size": 14337}, ranks(2, 2), []),
        (R1_NVFP4, ranks(64), []),
        (R1_NVFP4, ranks(256), ["error D6"]),
        (R1_NVFP4 | {"hidden_size": 7160}, ranks(1), ["error D6"]),
        # with HELIX the ranks of a context share the experts too
        ("DeepSeek-R1", ranks(16, context_parallel_size=2, cp_config={"cp_type": "HELIX"}), ["error D6"]),
        ("DeepSeek-R1", ranks(16, 32, context_parallel_size=2, cp_config={"cp_type": "HELIX"}), []),
        # sizes that don't multiply out (A2) break nothing here
        ("DeepSeek-R1", ranks(8, 16), []),
        # D2, D3, D4, C6
        ("DeepSeek-R1", balanced(288), []),
        ("DeepSeek-R1", balanced(290), ["error D2"]),
        ("DeepSeek-R1", balanced(None), ["error D2"]),
        ("DeepSeek-R1", balanced(128), ["error D3"]),
        ("DeepSeek-R1", wide(moe_config={"load_balancer": "eplb.yaml"}), ["warning D4"]),
        ("Mixtral-8x7B", balanced(16, 16), []),
        ("DeepSeek-R1", ranks(8, 8, moe_config={"load_balancer": {"num_slots": 288}}), ["error C6"]),
        ("Llama-3.1-8B", ranks(8, moe_config={"load_balancer": {"num_slots": 288}}), []),
        # D13, D14
        ("DeepSeek-R1", balanced(288) | {"load_format": "GMS"}, ["error D14"]),
        ("DeepSeek-R1", balanced(288) | {"dwdp_config": {"dwdp_size": 2}}, ["error D13"]),
        ("DeepSeek-R1", wide(load_format="GMS"), []),
        # D11
        ("DeepSeek-R1", wide(16), []),
        ("DeepSeek-R1", wide(32), []),
        ("Mixtral-8x7B", wide(1), []),
        (MIXTRAL | {"num_local_experts": 6}, wide(6), ["info D11"]),
        # C4
        ("DeepSeek-R1", wide(16, max_num_tokens=8192), []),
        ("DeepSeek-R1", wide(32, max_num_tokens=8192), ["warning C4"]),
        ("DeepSeek-R1", wide(32, max_num_tokens=None), ["warning C4"]),
        ("DeepSeek-R1", wide(32, max_num_tokens=8192, moe_config={"max_num_tokens": 32768}), []),
        ("DeepSeek-R1", ranks(32, 32, max_num_tokens=8192), []),
        # C5
        ("Llama-3.1-8B", ranks(2, lora_config={"cuda_graph_specialize_lora": True}), []),
        (
            "Llama-3.1-8B",
            ranks(2, enable_attention_dp=True, lora_config={"cuda_graph_specialize_lora": True}),
            ["warning C1", "error C5"],
        ),
        ("DeepSeek-R1", wide(lora_config={"cuda_graph_specialize_lora": True}), ["error C5"]),
        ("DeepSeek-R1", wide(lora_config={"cuda_graph_specialize_lora": False}), []),
        # C1
        ("Llama-3.1-8B", ranks(2, enable_attention_dp=True), ["warning C1"]),
        ("Llama-3.1-8B", ranks(1, enable_attention_dp=True), []),
        ("Mixtral-8x7B", ranks(2, enable_attention_dp=True), []),
        (
            {key: value for key, value in ZOO["DeepSeek-R1"].items() if key != "n_routed_experts"},
            ranks(2, enable_attention_dp=True),
            [],
        ),
        # C7
        ("DeepSeek-R1", wide(attention_dp_config={"enable_balance": True, "timeout_iters": -1}), ["error C7"]),
        ("DeepSeek-R1", wide(attention_dp_config={"enable_balance": True, "timeout_iters": 0}), []),
        ("DeepSeek-R1", wide(attention_dp_config={"enable_balance": False, "timeout_iters": -1}), []),
    ],
)
def test_layouts(model: str | dict[str, Any], engine: dict[str, Any], expected: list[str]) -> None:
    # C2 reports every large model under attention DP
    assert [line for line in finding_ids(subject_of(model, engine)) if line != "info C2"] == expected


ON_FILE = wide(moe_config={"load_balancer": "eplb.yaml"})


@pytest.mark.parametrize(("launched", "severity"), [(False, Severity.WARNING), (True, Severity.ERROR)])
def test_a_balancer_s_file_that_was_not_read_is_missing_where_the_ranks_run(launched: bool, severity: Severity) -> None:
    subject = replace(subject_of("DeepSeek-R1", ON_FILE), launched=launched)
    assert (subject.config.moe.balanced, subject.config.moe.balancer_read) == (True, False)
    finding = only(subject, "D4")
    assert (finding.severity, "eplb.yaml" in finding.message) == (severity, True)
    # nothing is known of its slots
    assert [line for line in finding_ids(subject) if line != "info C2"] == [f"{severity.value} D4"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_slots: 288", []),
        ("num_slots: 290", ["error D2"]),
        ("num_slots: 128", ["error D3"]),
        ("layer_updates_per_iter: 2", ["error D2"]),
    ],
)
@pytest.mark.parametrize("launched", [False, True])
def test_a_balancer_s_file_that_was_read_is_judged(text: str, expected: list[str], launched: bool) -> None:
    subject = subject_of("DeepSeek-R1", ON_FILE)
    merged = with_balancer(MergedConfig(subject.config), text)
    assert merged.config.moe.balancer_read
    subject = replace(subject, config=merged.config, launched=launched)
    assert [line for line in finding_ids(subject) if line != "info C2"] == expected
    if expected == ["error D2"] and "layer" in text:
        assert "eplb.yaml" in only(subject, "D2").found


def test_experts_that_the_checkpoint_left_as_they_were_need_no_blocks() -> None:
    quantised = ZOO["Qwen3-30B-A3B-FP8"]
    excluded = quantised["quantization_config"] | {"modules_to_not_convert": ["model.layers.*.mlp.experts"]}
    assert finding_ids(subject_of(quantised | {"quantization_config": excluded}, ranks(4))) == []


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        ({3: [*range(256), *range(32)]}, "layer 4 has none"),
        ({layer: [*range(256), *range(31)] for layer in range(3, 61)}, "287 entries for 288 slots"),
        ({layer: [0] * 288 for layer in range(3, 61)}, "places 1 of 256 experts"),
        ({layer: [*range(256), *range(255, 287)] for layer in range(3, 61)}, "names expert 286 of 256"),
        ({layer: [*range(256), *range(32)] for layer in range(3, 61)}, None),
    ],
)
def test_assignments(assignments: dict[int, list[int]], words: str | None) -> None:
    subject = subject_of("DeepSeek-R1", balanced(288, initial_global_assignments=assignments))
    if words is None:
        assert "error D3" not in finding_ids(subject)
    else:
        assert words in only(subject, "D3").found


@pytest.mark.parametrize(
    ("model", "engine", "rule", "fix"),
    [
        ("Mixtral-8x7B", ranks(16, 16), "D1", "set moe_expert_parallel_size: 8, or to 4, 2, 1, and leave moe_tensor"),
        ("DeepSeek-R1", ranks(32), "D6", "set moe_expert_parallel_size: 32, or to 16, 8, 4, 2, and leave moe_tensor"),
        ("DeepSeek-R1", balanced(290), "D2", "a multiple of 8 of at least 256: 256"),
        ("DeepSeek-R1", wide(32, max_num_tokens=8192), "C4", "max_num_tokens: 4096"),
    ],
)
def test_what_to_do(model: str, engine: dict[str, Any], rule: str, fix: str) -> None:
    finding = only(subject_of(model, engine), rule)
    assert fix in finding.fix
    assert finding.found
    assert finding.expected
    assert not finding.message.endswith(".")


def test_the_sizes_that_are_advised_pass() -> None:
    for model in ("Mixtral-8x7B", "DeepSeek-R1", "Qwen3-30B-A3B-FP8", "MiniMax-M2.5"):
        for tp in (8, 16, 32, 64):
            for line in (f for rule in experts.RULES for f in rule(subject_of(model, ranks(tp)))):
                advised = line.fix.removeprefix("set moe_expert_parallel_size: ").partition(",")[0]
                assert finding_ids(subject_of(model, ranks(tp, int(advised)))) == []


def test_an_old_version_is_said_to_round_down() -> None:
    assert "rounds down" in only(subject_of("Mixtral-8x7B", ranks(16, 16), version="1.2.1"), "D1").message
    assert "rounds down" not in only(subject_of("Mixtral-8x7B", ranks(16, 16)), "D1").message


@pytest.mark.parametrize(("model", "gigabytes"), [("DeepSeek-R1", "3.5 GiB"), ("Qwen3-0.6B", None)])
def test_whole_embeddings(model: str, gigabytes: str | None) -> None:
    subject = subject_of(model, ranks(8, enable_attention_dp=True))
    if gigabytes is None:
        assert "info C2" not in finding_ids(subject)
    else:
        assert gigabytes in only(subject, "C2").message


SIZE = st.none() | st.integers(1, 300)
FORMAT = st.none() | st.builds(
    WeightFormat, st.sampled_from(["FP8", "FP8_BLOCK_SCALES", "NVFP4", "MXFP4", "W4A16_AWQ", "odd"]), SIZE
)
LAYER = st.builds(
    Layer,
    st.sampled_from(Mixer),
    st.sampled_from(Feed),
    SIZE,
    st.builds(LayerFormats, FORMAT, FORMAT, FORMAT, FORMAT),
    st.builds(AttentionSizes, SIZE, SIZE, SIZE, SIZE, st.booleans(), st.booleans(), st.integers(0, 128)),
    SIZE,
    st.booleans(),
)
QUANTISATION = st.builds(
    Quantisation,
    st.sampled_from(
        ["FP8", "FP8_BLOCK_SCALES", "FP8_ROWWISE", "NVFP4", "MXFP4", "W4A16_AWQ", "W4A8_AWQ", "X", "", "NONE"]
    ),
    SIZE,
    st.sampled_from([None, "FP8", "NVFP4", "INT8"]),
    certain=st.booleans(),
)
SHAPE = st.builds(
    ModelShape,
    name=st.sampled_from(["LlamaForCausalLM", "DeepseekV3ForCausalLM", ""]),
    attention_heads=SIZE,
    kv_heads=SIZE,
    head_dim=SIZE,
    num_layers=SIZE,
    hidden_size=st.none() | st.sampled_from([16, 100, 2880, 7168]),
    intermediate_size=SIZE,
    vocab_size=st.none() | st.integers(1, 2**31),
    latent=st.none() | st.builds(LatentAttention, st.integers(1, 512), SIZE, SIZE, SIZE, SIZE),
    experts=st.none() | st.builds(Experts, st.integers(1, 300), SIZE, SIZE, st.integers(0, 300)),
    state_space=st.none() | st.builds(StateSpace, st.integers(1, 64), st.integers(1, 64), SIZE, SIZE, SIZE),
    layers=st.none() | st.lists(LAYER, max_size=4).map(tuple),
    index_head_dim=SIZE,
    tied_embeddings=st.none() | st.booleans(),
    encoder_decoder=st.booleans(),
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
    quantisation=st.none() | QUANTISATION,
)
CONFIG = st.builds(
    EngineConfig,
    tp_size=st.integers(1, 64),
    pp_size=st.integers(1, 3),
    cp_size=st.integers(1, 3),
    enable_attention_dp=st.booleans(),
    max_num_tokens=SIZE | st.just(2**31 - 1),
    moe_tp_size=SIZE,
    moe_ep_size=SIZE,
    moe_cluster_size=st.none() | st.integers(1, 3),
    cp_type=st.sampled_from([None, "HELIX", "ULYSSES", "X"]),
    gpus_per_node=SIZE,
    kv_cache=st.builds(KvCache, st.sampled_from(["auto", "fp8", "fp8_ds_mla", "nvfp4", "half", "x"])),
    moe=st.builds(
        Moe,
        st.none()
        | st.sampled_from(["AUTO", "CUTLASS", "cutedsl", "CUTEDSL", "TRTLLM", "MARLIN", "MEGAMOE_DEEPGEMM", "x"]),
        SIZE,
        st.none() | st.just("path"),
        SIZE,
        st.booleans(),
        st.booleans(),
        st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 300)).map(tuple)), max_size=3).map(tuple),
    ),
    load_format=st.sampled_from([None, "GMS"]),
    lora_cuda_graph=st.booleans(),
    adp_timeout_iters=st.none() | st.integers(-1, 1),
    keys=st.dictionaries(
        st.sampled_from(["attention_dp_config", "sparse_attention_config", "dwdp_config", "use_cute_dsl_topk"]),
        st.none()
        | st.booleans()
        | st.dictionaries(
            st.sampled_from(["enable_balance", "indexer_k_dtype", "index_head_dim"]),
            st.sampled_from(["fp4", True, 64, None]),
        ),
    ),
)


@settings(max_examples=400)
@given(
    SHAPE,
    CONFIG,
    st.builds(Cluster, st.integers(1, 3), st.integers(1, 8), st.sampled_from([None, "abacus", *GPUS])),
    st.sampled_from([None, "1.0.0", "1.2.1", "1.3.0rc22"]),
)
def test_no_rule_raises(shape: ModelShape, config: EngineConfig, cluster: Cluster, version: str | None) -> None:
    subject = LayoutSpec(shape, config, cluster, version=None if version is None else parse_trtllm_version(version))
    for module in (experts, backends, dense, attention_dp, architecture):
        for rule in module.RULES:
            for finding in rule(subject):
                assert finding.message
                assert not finding.message.endswith(".")
                assert finding.found or finding.expected
                assert finding.fix or finding.severity is not Severity.ERROR
