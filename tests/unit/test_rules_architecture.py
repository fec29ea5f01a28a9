# SPDX-License-Identifier: Apache-2.0
"""Rules about number formats and kinds of GPU: each of them both ways, on public models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.finding import Finding
from dynamo_mpi.layout.gpus import GPUS, Gpu
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.rules import architecture
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.conftest import ROOT
from tests.unit.model_zoo import QUANT_FILES, ZOO

LLAMA = ZOO["Llama-3.1-8B"]


def modelopt(algo: str, kv_algo: str | None = None) -> dict[str, Any]:
    scheme = {} if kv_algo is None else {"kv_cache_scheme": kv_algo}
    return {"quantization_config": {"quant_algo": algo, "quant_method": "modelopt", **scheme}}


def subject_of(
    model: str | dict[str, Any], gpu: str | None, engine: dict[str, Any] | None = None, version: str | None = None
) -> LayoutSpec:
    config = merge(EngineLayers(yaml_text=json.dumps({"tensor_parallel_size": 8} | (engine or {})))).config
    quant_file = json.dumps(QUANT_FILES[model]) if isinstance(model, str) and model in QUANT_FILES else None
    shape = parse_model_shape(json.dumps(ZOO[model] if isinstance(model, str) else model), "config.json", quant_file)
    return LayoutSpec(
        shape, config, Cluster(1, 8, gpu), version=None if version is None else parse_trtllm_version(version)
    )


def findings_of(subject: LayoutSpec) -> list[Finding]:
    return [finding for rule in architecture.RULES for finding in rule(subject)]


def finding_ids(subject: LayoutSpec) -> list[str]:
    return [f"{finding.severity.value} {finding.rule}" for finding in findings_of(subject)]


def kv(dtype: str, **others: Any) -> dict[str, Any]:
    return {"kv_cache_config": {"dtype": dtype, **others}}


@pytest.mark.parametrize(
    ("model", "runs", "doubtful", "fails"),
    [
        ("Llama-3.1-8B", "a100 l40s h100 b200 gb10", "", ""),
        (LLAMA | modelopt("FP8"), "l40s h100 b200 gb300 rtx-pro-6000 gb10", "", "a100"),
        ("Qwen3-32B-FP8", "l4 h100 b200 b300 rtx-pro-6000", "gb10", "a100 a100-40"),
        (LLAMA | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "h100 h200", "b200 l40s", "a100"),
        (LLAMA | modelopt("NVFP4"), "b200 gb300 rtx-pro-6000 gb10", "", "h100 l40s a100"),
        (ZOO["Mixtral-8x7B"] | modelopt("NVFP4"), "b200 gb10", "", "h100 l40s a100"),
        ("gpt-oss-120b", "h100 b200 rtx-pro-6000", "", "a100 l40s"),
        (LLAMA | modelopt("W4A8_AWQ"), "l40s h100", "b200 rtx-pro-6000", "a100"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "a100 l40s h100 b200", "gb10", ""),
    ],
)
def test_weights(model: str | dict[str, Any], runs: str, doubtful: str, fails: str) -> None:
    for gpus, expected in ((runs, []), (doubtful, ["warning G"]), (fails, ["error G"])):
        for gpu in gpus.split():
            assert finding_ids(subject_of(model, gpu)) == expected, gpu


@pytest.mark.parametrize("model", ["Qwen3-32B-FP8", "gpt-oss-120b", LLAMA | modelopt("NVFP4")])
def test_nothing_is_said_where_the_gpu_isnt_known(model: str | dict[str, Any]) -> None:
    assert finding_ids(subject_of(model, None)) == []
    assert finding_ids(subject_of(model, "abacus")) == []


def test_unknown_formats_get_no_finding() -> None:
    (finding,) = findings_of(subject_of(LLAMA | modelopt("W3A5_NEW"), "h100"))
    assert finding.severity.value == "info"
    assert "W3A5_NEW" in finding.message


@pytest.mark.parametrize(("version", "expected"), [("1.0.0", ["error G"]), ("1.1.0", []), (None, [])])
def test_block_scales_came_to_sm_120_later(version: str | None, expected: list[str]) -> None:
    assert finding_ids(subject_of("Qwen3-32B-FP8", "rtx-pro-6000", version=version)) == expected


GEMM, MOE = {"nvfp4_gemm_config": {"allowed_backends": ["marlin"]}}, {"moe_config": {"backend": "MARLIN"}}
GEMM_LINE, MOE_LINE = "nvfp4_gemm_config: {allowed_backends: [marlin]}", "moe_config: {backend: MARLIN}"
EXPERTS_ALONE = ["lm_head", "*self_attn*"]


@pytest.mark.parametrize("gpu", ["h100", "l40s"])
@pytest.mark.parametrize(
    ("model", "excluded", "engine", "missing"),
    [
        ("Mixtral-8x7B", [], {}, [GEMM_LINE, MOE_LINE]),
        ("Mixtral-8x7B", [], MOE, [GEMM_LINE]),
        ("Mixtral-8x7B", [], GEMM, [MOE_LINE]),
        ("Mixtral-8x7B", [], GEMM | MOE, []),
        ("Mixtral-8x7B", EXPERTS_ALONE, {}, [MOE_LINE]),
        ("Mixtral-8x7B", EXPERTS_ALONE, MOE, []),
        ("Llama-3.1-8B", [], MOE, [GEMM_LINE]),
        ("Llama-3.1-8B", [], GEMM, []),
        ("Llama-3.1-8B", [], {"nvfp4_gemm_config": {"allowed_backends": ["cutlass"]}}, [GEMM_LINE]),
    ],
)
def test_nvfp4_before_blackwell(
    model: str, excluded: list[str], engine: dict[str, Any], missing: list[str], gpu: str
) -> None:
    quantisation = modelopt("NVFP4")["quantization_config"] | {"ignore": excluded}
    subject = subject_of(ZOO[model] | {"quantization_config": quantisation}, gpu, engine)
    (finding,) = findings_of(subject)
    assert (finding.rule, finding.severity.value) == ("G", "error" if missing else "info")
    assert [line for line in (GEMM_LINE, MOE_LINE) if line in finding.fix] == missing


@pytest.mark.parametrize(
    ("engine", "missing"), [({}, [GEMM_LINE, MOE_LINE]), (MOE, [GEMM_LINE]), (GEMM, [MOE_LINE]), (GEMM | MOE, [])]
)
def test_nemotron_in_nvfp4_before_blackwell(engine: dict[str, Any], missing: list[str]) -> None:
    folder, name = ROOT / "tests/data/model_configs", "Nemotron-3-Ultra-550B-A55B-NVFP4"
    quant_text = (folder / f"{name}.hf_quant_config.json").read_text()
    shape = parse_model_shape((folder / f"{name}.json").read_text(), "config.json", quant_text)
    config = merge(EngineLayers(yaml_text=json.dumps(engine))).config
    (finding,) = findings_of(LayoutSpec(shape, config, Cluster(1, 8, "h100")))
    assert finding.severity.value == ("error" if missing else "info")
    assert [line for line in (GEMM_LINE, MOE_LINE) if line in finding.fix] == missing


def test_nvfp4_runs_before_blackwell_from_1_3_alone() -> None:
    (finding,) = findings_of(subject_of(ZOO["Mixtral-8x7B"] | modelopt("NVFP4"), "h100", GEMM | MOE, version="1.2.1"))
    assert (finding.severity.value, "marlin" in finding.fix) == ("error", False)


@pytest.mark.parametrize(
    ("cache", "version", "expected"),
    [
        ({"enable_block_reuse": True}, "1.2.0", ["error G4"]),
        ({"enable_block_reuse": True}, "1.3.0rc22", []),
        ({"enable_block_reuse": False}, "1.2.0", []),
        ({}, "1.2.0", []),
    ],
)
def test_hybrids_reuse_blocks_from_1_3_on(cache: dict[str, Any], version: str, expected: list[str]) -> None:
    subject = subject_of("Nemotron-3-Super-120B-A12B-FP8", None, {"kv_cache_config": cache}, version)
    assert finding_ids(subject) == expected


def test_bfloat16_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "t4", Gpu("t4", 75, 2**34))
    assert finding_ids(subject_of("Llama-3.1-8B", "t4")) == ["error G"]
    assert finding_ids(subject_of(LLAMA | {"torch_dtype": "float16"}, "t4")) == []


@pytest.mark.parametrize(
    ("model", "engine", "gpu", "expected"),
    [
        ("Llama-3.1-8B", kv("fp8"), "h100", []),
        ("Llama-3.1-8B", kv("FP8"), "l40s", []),
        ("Llama-3.1-8B", kv("fp8"), "a100", ["warning G"]),
        ("Llama-3.1-8B", kv("fp8"), None, []),
        ("Llama-3.1-8B", kv("auto"), "a100", []),
        ("Nemotron-3-Super-120B-A12B-FP8", kv("auto"), "h100", []),
        (LLAMA | modelopt("W4A16_AWQ", "FP8"), kv("auto"), "a100", ["warning G"]),
        (LLAMA | modelopt("W4A16_AWQ", "FP8"), kv("bfloat16"), "a100", []),
        (LLAMA | modelopt("NVFP4", "NVFP4"), kv("auto"), "b200", []),
        (LLAMA | modelopt("NVFP4", "NVFP4"), kv("nvfp4"), "gb10", ["warning G"]),
        (LLAMA | modelopt("FP8", "NVFP4"), kv("nvfp4"), "h100", ["error G"]),
        ("Llama-3.1-8B", kv("nvfp4"), None, ["warning G"]),
        ("DeepSeek-V3.2", kv("fp8_ds_mla"), "h200", []),
        ("DeepSeek-V3.2", kv("fp8_ds_mla"), "b200", ["error G"]),
        ("DeepSeek-V3.2", kv("fp8_ds_mla"), None, []),
        ("DeepSeek-R1", kv("fp8_ds_mla"), "h200", ["error G"]),
        # G1
        ("Llama-3.1-8B", kv("bfloat16"), None, []),
        ("Llama-3.1-8B", kv("half"), None, []),
        ("Llama-3.1-8B", kv("int4"), None, ["error G1"]),
        ("Llama-3.1-8B", kv("bf16"), "h100", ["error G1"]),
        # G2
        ("Llama-3.1-8B", {"use_cute_dsl_bf16_gemm": True}, "h100", ["error G2"]),
        ("Llama-3.1-8B", {"use_cute_dsl_bf16_gemm": True}, "b200", []),
        ("Llama-3.1-8B", {"use_cute_dsl_bf16_gemm": False}, "h100", []),
        ("Llama-3.1-8B", {"use_cute_dsl_bf16_gemm": True}, None, []),
        # G4
        ("Kimi-K2", {}, "h100", []),
        ("GLM-5", {}, "a100", ["warning G4"]),
        ("GLM-5", kv("auto", enable_block_reuse=False), "a100", []),
        ("GLM-5", kv("auto", enable_block_reuse=False) | {"enable_chunked_prefill": True}, "a100", ["warning G4"]),
        ("Llama-3.1-8B", {}, "a100", []),
        ("Nemotron-3-Super-120B-A12B-FP8", kv("auto", enable_block_reuse=True), None, []),
        # G5
        ("GLM-5", {"sparse_attention_config": {"indexer_k_dtype": "fp4"}}, "b200", []),
        ("GLM-5", {"sparse_attention_config": {"indexer_k_dtype": "fp4"}}, "h100", ["error G5"]),
        ("GLM-5", {"sparse_attention_config": {"indexer_k_dtype": "fp4", "index_head_dim": 64}}, None, ["error G5"]),
        ("GLM-5", {"sparse_attention_config": {"indexer_k_dtype": "fp8"}}, "h100", []),
    ],
)
def test_cache_and_kernels(
    model: str | dict[str, Any], engine: dict[str, Any], gpu: str | None, expected: list[str]
) -> None:
    assert finding_ids(subject_of(model, gpu, engine)) == expected


def test_what_is_said() -> None:
    (finding,) = findings_of(subject_of("Qwen3-32B-FP8", "a100"))
    assert finding.message == "a100 can't run FP8_BLOCK_SCALES weights"
    assert "SM 80" in finding.found
    assert finding.expected == "SM 89, 90, 100, 103, 120"
    (finding,) = findings_of(subject_of("Llama-3.1-8B", "a100", kv("fp8")))
    assert "support matrix has" in finding.message
    assert "may refuse" in finding.message
    assert finding.fix == "set kv_cache_config: {dtype: bfloat16}, or try it"
