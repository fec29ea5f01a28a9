# SPDX-License-Identifier: Apache-2.0
"""Rules about dense layers: each of them both ways, on public models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.finding import Finding
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.rules import dense
from tests.unit.model_zoo import ZOO

FP8_BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
NVFP4 = {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}}
LLAMA = ZOO["Llama-3.1-8B"]
NEXT_FP8 = ZOO["Qwen3-Next-80B-A3B"] | FP8_BLOCKS
HELIX = {"context_parallel_size": 2, "cp_config": {"cp_type": "HELIX"}}


def awq(group_size: int | None) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "awq", "group_size": group_size}}


def excluding(model: dict[str, Any], *names: str) -> dict[str, Any]:
    return model | {"quantization_config": model["quantization_config"] | {"modules_to_not_convert": [*names]}}


def subject_of(model: str | dict[str, Any], tp_size: int, **engine: Any) -> LayoutSpec:
    config = merge(EngineLayers(yaml_text=json.dumps({"tensor_parallel_size": tp_size} | engine))).config
    shape = parse_model_shape(json.dumps(ZOO[model] if isinstance(model, str) else model), "config.json")
    ranks = config.world_size
    return LayoutSpec(shape, config, Cluster(max(ranks // 8, 1), min(ranks, 8)))


def findings_of(subject: LayoutSpec) -> list[Finding]:
    return [finding for rule in dense.RULES for finding in rule(subject)]


def finding_ids(subject: LayoutSpec) -> list[str]:
    return [f"{finding.severity.value} {finding.rule}" for finding in findings_of(subject)]


@pytest.mark.parametrize(
    ("model", "tp_size", "expected"),
    [
        # E1
        ("Llama-3.1-8B", 8, []),
        ("Qwen2.5-72B", 8, []),
        ("Qwen2.5-72B", 64, []),
        (LLAMA | {"intermediate_size": 14337}, 1, []),
        (LLAMA | {"intermediate_size": 14337}, 2, ["error E1"]),
        # odd halves: 2 I divides, I doesn't (E3)
        (LLAMA | {"intermediate_size": 14340}, 8, ["error E1"]),
        ("Llama-4-Maverick-17B-128E", 8, []),
        ("Mixtral-8x7B", 32, []),
        # E4: MLP
        ("Qwen3-32B-FP8", 8, []),
        ("Qwen3-32B-FP8", 16, ["error E4"]),
        ("Qwen3-32B-FP8", 32, ["error E4"]),
        ("Qwen3-32B", 32, []),
        (excluding(ZOO["Qwen3-32B-FP8"], "model.layers.*.mlp.down_proj"), 16, []),
        ("Qwen3-30B-A3B-FP8", 16, []),
        ("MiniMax-M2.5", 16, []),
        # E4: attention
        ("MiMo-V2-Flash", 2, []),
        ("MiMo-V2-Flash", 4, ["error E4"]),
        (excluding(ZOO["MiMo-V2-Flash"], "re:.*self_attn.*"), 4, []),
        # heads that don't divide are reported by B1 and B3
        (LLAMA | FP8_BLOCKS | {"num_attention_heads": 36, "head_dim": 96, "intermediate_size": 16384}, 8, []),
        # shared experts
        (NEXT_FP8, 4, []),
        (NEXT_FP8, 8, ["error E4"]),
        ("Qwen3-Next-80B-A3B", 8, []),
        (excluding(NEXT_FP8, "model.layers.*.mlp.shared_expert"), 8, []),
        # E5
        (LLAMA | NVFP4, 32, []),
        (LLAMA | NVFP4 | {"intermediate_size": 14400}, 4, []),
        (LLAMA | NVFP4 | {"intermediate_size": 14400}, 8, ["error E5"]),
        (LLAMA | NVFP4 | {"head_dim": 72}, 32, ["error E5"]),
        # E6
        (LLAMA | awq(128), 16, []),
        (LLAMA | awq(128), 32, ["error E6"]),
        (LLAMA | awq(32), 32, []),
        (LLAMA | awq(None), 32, ["warning E6"]),
        ("gpt-oss-120b", 32, []),
        # E9
        ("DeepSeek-R1", 8, []),
        ("DeepSeek-R1", 16, ["info E9"]),
        ("Kimi-K2", 64, ["info E9"]),
        (ZOO["DeepSeek-R1"] | {"intermediate_size": 18433}, 1, ["error E9"]),
        (ZOO["DeepSeek-R1"] | {"intermediate_size": 18433} | NVFP4, 1, ["error E9"]),
        (ZOO["GLM-5"] | {"intermediate_size": 12290}, 8, ["info E9"]),
        ("GLM-4.5", 8, []),
        ("DeepSeek-V4-Pro", 16, []),
    ],
)
def test_widths(model: str | dict[str, Any], tp_size: int, expected: list[str]) -> None:
    assert finding_ids(subject_of(model, tp_size)) == expected


@pytest.mark.parametrize(
    "model",
    [
        "Qwen3-32B-FP8",
        "MiMo-V2-Flash",
        "DeepSeek-R1",
        "Llama-4-Maverick-17B-128E",
        LLAMA | {"intermediate_size": 14337},
    ],
)
def test_attention_data_parallelism_shares_nothing_out(model: str | dict[str, Any]) -> None:
    assert finding_ids(subject_of(model, 16, enable_attention_dp=True)) == []


def test_under_helix_context_ranks_share_the_mlp_too() -> None:
    assert finding_ids(subject_of("Qwen3-32B-FP8", 8)) == []
    assert finding_ids(subject_of("Qwen3-32B-FP8", 8, **HELIX)) == ["error E4"]
    assert finding_ids(subject_of("Qwen3-32B-FP8", 4, **HELIX)) == []


def test_one_finding_for_all_three_projections() -> None:
    (finding,) = findings_of(subject_of(LLAMA | {"intermediate_size": 14337}, 2))
    assert "down_proj" in finding.expected
    assert "gate and up" in finding.expected


@pytest.mark.parametrize(
    ("model", "tp_size", "message", "fix"),
    [
        ("Qwen3-32B-FP8", 16, "would hold 1600 of an MLP of 25600", "set tensor_parallel_size to one of 1, 2, 4, 8"),
        (
            "MiMo-V2-Flash",
            8,
            "would hold 1 KV head of 192",
            "set tensor_parallel_size to one of 1, 2, or enable_attention_dp",
        ),
        (
            NEXT_FP8,
            8,
            "would hold 64 of shared experts of 512",
            "set tensor_parallel_size to one of 1, 2, 4, or enable",
        ),
        ("DeepSeek-R1", 16, "divided over 8 ranks and held 2 times", ""),
    ],
)
def test_what_is_said(model: str | dict[str, Any], tp_size: int, message: str, fix: str) -> None:
    (finding,) = findings_of(subject_of(model, tp_size))
    assert message in finding.message
    assert finding.fix.startswith(fix)
    assert finding.found


def test_the_sizes_that_are_advised_pass() -> None:
    for model in ("Qwen3-32B-FP8", "MiMo-V2-Flash"):
        (finding,) = findings_of(subject_of(model, 16))
        sizes = finding.fix.removeprefix("set tensor_parallel_size to one of ").partition(", or ")[0]
        for size in sizes.split(", "):
            assert finding_ids(subject_of(model, int(size))) == []


def test_what_isnt_certain_is_a_warning() -> None:
    subject = subject_of("Qwen3-32B-FP8", 16)
    assert subject.shape.quantisation is not None
    unsure = replace(subject.shape, quantisation=replace(subject.shape.quantisation, certain=False))
    assert finding_ids(replace(subject, shape=unsure)) == ["warning E4"]
    # layers that can't be distinguished may be excluded or not
    assert finding_ids(replace(subject, shape=replace(subject.shape, layers=None))) == ["warning E4"]
