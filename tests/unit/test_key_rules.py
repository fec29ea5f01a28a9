# SPDX-License-Identifier: Apache-2.0
"""The engine YAML's keys: what is refused, from when, and the exact line to write instead."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_keys import Renamed, engine_keys
from dynamo_mpi.layout.finding import Finding, Severity, errors
from dynamo_mpi.layout.key_rules import check_keys
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.conftest import ROOT

KEYS = engine_keys()
KEYS_FILE = ROOT / "dynamo_mpi/layout/engine_keys.json"
NEWEST = KEYS.newest
RENAMED = [row for rows in KEYS.renamed.values() for row in rows]
VERSIONS = ["0.20", "1.0", "1.1", "1.2.1", "1.3.0rc3", "1.3.0rc20", NEWEST, "1.3.0", "1.4", None]
ERROR, WARNING = Severity.ERROR, Severity.WARNING


def check(text: str, version: str | None) -> list[Finding]:
    config = yaml.safe_load(text)
    assert isinstance(config, dict)
    return check_keys(config, None if version is None else parse_trtllm_version(version))


def only(text: str, version: str | None) -> Finding:
    (finding,) = check(text, version)
    assert finding.rule == "H"
    return finding


def nested(path: str, value: str) -> str:
    *sections, leaf = path.split(".")
    text = f"{leaf}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return text


TRT_KEYS = [row.old for row in RENAMED if "TensorRT engine backend" in row.hint]

# old path, its value, version, severity, fix
ROWS: list[tuple[str, str, str | None, Severity, str]] = [
    ("pytorch_backend_config", "{}", None, ERROR, "remove the line"),
    ("enable_overlap_scheduler", "true", None, ERROR, "disable_overlap_scheduler: false"),
    ("use_cuda_graph", "true", "1.0", ERROR, "cuda_graph_config: {}"),
    ("cuda_graph_batch_sizes", "[1, 2]", "1.0", ERROR, "cuda_graph_config: {batch_sizes: [1, 2]}"),
    ("cuda_graph_max_batch_size", "64", "1.0", ERROR, "cuda_graph_config: {max_batch_size: 64}"),
    ("cuda_graph_padding_enabled", "true", "1.0", ERROR, "cuda_graph_config: {enable_padding: true}"),
    ("cuda_graph_config.padding_enabled", "true", "1.2.1", ERROR, "enable_padding: true (under cuda_graph_config)"),
    ("cuda_graph_config.cuda_graph_batch_sizes", "[1]", "1.2.1", ERROR, "batch_sizes: [1] (under cuda_graph_config)"),
    ("cuda_graph_config.cuda_graph_max_batch_size", "8", None, ERROR, "max_batch_size: 8 (under cuda_graph_config)"),
    (
        "cuda_graph_config.cuda_graph_padding_enabled",
        "false",
        None,
        ERROR,
        "enable_padding: false (under cuda_graph_config)",
    ),
    (
        "cuda_graph_config.use_cuda_graph",
        "true",
        None,
        ERROR,
        "remove the line; `cuda_graph_config: null` turns graphs off",
    ),
    ("torch_compile_enabled", "false", None, ERROR, "torch_compile_config: null"),
    ("torch_compile_fullgraph", "true", None, ERROR, "torch_compile_config: {enable_fullgraph: true}"),
    ("torch_compile_inductor_enabled", "true", None, ERROR, "torch_compile_config: {enable_inductor: true}"),
    (
        "torch_compile_piecewise_cuda_graph",
        "true",
        "1.2.1",
        ERROR,
        "torch_compile_config: {enable_piecewise_cuda_graph: true}",
    ),
    ("torch_compile_enable_userbuffers", "true", None, ERROR, "torch_compile_config: {enable_userbuffers: true}"),
    ("torch_compile_max_num_streams", "3", None, ERROR, "torch_compile_config: {max_num_streams: 3}"),
    ("kv_cache_dtype", "fp8", None, ERROR, "kv_cache_config: {dtype: fp8}"),
    ("kv_cache_free_gpu_mem_fraction", "0.8", None, ERROR, "kv_cache_config: {free_gpu_memory_fraction: 0.8}"),
    ("kv_cache_free_gpu_memory_fraction", "0.8", None, ERROR, "kv_cache_config: {free_gpu_memory_fraction: 0.8}"),
    ("moe_backend", "TRTLLM", None, ERROR, "moe_config: {backend: TRTLLM}"),
    ("moe_max_num_tokens", "4096", None, ERROR, "moe_config: {max_num_tokens: 4096}"),
    ("moe_load_balancer", "/mnt/eplb.yaml", None, ERROR, "moe_config: {load_balancer: /mnt/eplb.yaml}"),
    ("autotuner_enabled", "false", None, ERROR, "enable_autotuner: false"),
    ("mixed_sampler", "true", "1.0", ERROR, "enable_mixed_sampler: true"),
    ("mixed_sampler", "true", "1.1", ERROR, "remove the line; the sampler mixes strategies by itself"),
    ("enable_mixed_sampler", "true", "1.1", ERROR, "remove the line; the sampler mixes strategies by itself"),
    ("enable_trtllm_sampler", "true", "1.1", ERROR, "sampler_type: TRTLLMSampler"),
    ("enable_trtllm_sampler", "true", NEWEST, ERROR, "remove the line; there is one sampler, TorchSampler"),
    ("sampler_type", "auto", NEWEST, WARNING, "remove the line; there is one sampler, TorchSampler"),
    ("max_lora_rank", "64", None, ERROR, "lora_config: {max_lora_rank: 64}"),
    ("max_loras", "2", None, ERROR, "lora_config: {max_loras: 2}"),
    ("max_cpu_loras", "2", None, ERROR, "lora_config: {max_cpu_loras: 2}"),
    ("connector_config", "{connector_module: m}", "1.1", ERROR, "kv_connector_config: {connector_module: m}"),
    (
        "cache_transceiver_config.max_num_tokens",
        "4096",
        None,
        ERROR,
        "max_tokens_in_buffer: 4096 (under cache_transceiver_config)",
    ),
    ("build_config", "{max_batch_size: 8, strongly_typed: true}", "1.3.0rc25", ERROR, "max_batch_size: 8"),
    *((key, "1", None, ERROR, "remove the line; it belonged to the TensorRT engine backend") for key in TRT_KEYS),
    ("enable_sleep", "true", "1.3.0rc12", ERROR, "sleep_config: {}"),
    ("kv_cache_config.onboard_blocks", "true", NEWEST, ERROR, "remove the line; `host_cache_size` decides"),
    ("video_pruning_rate", "0.5", "1.3.0rc22", ERROR, "multimodal_config: {video_pruning_rate: 0.5}"),
    (
        "kv_cache_config.block_reuse_policy",
        "per_request",
        "1.3.0rc25",
        ERROR,
        "block_reuse_config: {policy: per_request} (under kv_cache_config)",
    ),
    (
        "kv_cache_config.block_reuse_config.block_reuse_policy",
        "per_request",
        "1.3.0rc25",
        ERROR,
        "policy: per_request (under kv_cache_config.block_reuse_config)",
    ),
    (
        "speculative_config.acceptance_window",
        "10",
        NEWEST,
        ERROR,
        "acceptance_rate_window_size: 10 (under speculative_config)",
    ),
    (
        "speculative_config.acceptance_length_threshold",
        "1.5",
        NEWEST,
        ERROR,
        "remove the line; `acceptance_rate_threshold` takes its place, and is a rate from 0 to 1",
    ),
    ("cp_config.cp_anchor_size", "8", NEWEST, ERROR, "remove the line; they belonged to cp_type STAR, which is gone"),
    ("cp_config.block_size", "8", NEWEST, ERROR, "remove the line; they belonged to cp_type STAR, which is gone"),
    (
        "torch_compile_config.enable_piecewise_cuda_graph",
        "true",
        NEWEST,
        WARNING,
        "prefill_cuda_graph_backend: piecewise",
    ),
    ("torch_compile_config.capture_num_tokens", "[1, 2]", NEWEST, WARNING, "prefill_capture_num_tokens: [1, 2]"),
    (
        "kv_cache_config.mamba_state_cache_interval",
        "256",
        NEWEST,
        WARNING,
        "mamba_state_config: {periodic_snapshot_interval: 256} (under kv_cache_config)",
    ),
    ("kv_cache_config.sink_token_length", "4", NEWEST, WARNING, "remove the line; it has no effect"),
    (
        "speculative_config.speculative_model_dir",
        "a/b",
        NEWEST,
        WARNING,
        "speculative_model: a/b (under speculative_config)",
    ),
    (
        "speculative_config.num_nextn_predict_layers",
        "3",
        NEWEST,
        WARNING,
        "max_draft_len: 3 (under speculative_config)",
    ),
    ("speculative_config.allow_advanced_sampling", "true", NEWEST, WARNING, "remove the line; it has no effect"),
    (
        "moe_cluster_parallel_size",
        "1",
        NEWEST,
        WARNING,
        "remove the line; tensor and expert parallel size say it all",
    ),
    ("perf_metrics_max_requests", "1", NEWEST, WARNING, "remove the line; it has no effect"),
    ("decoding_config", "{}", "1.0", WARNING, "remove the line; `speculative_config` takes its place"),
    ("tp_size", "8", None, ERROR, "tensor_parallel_size: 8"),
    ("tp", "8", None, ERROR, "tensor_parallel_size: 8"),
    ("pp_size", "2", None, ERROR, "pipeline_parallel_size: 2"),
    ("pp", "2", None, ERROR, "pipeline_parallel_size: 2"),
    ("cp_size", "2", None, ERROR, "context_parallel_size: 2"),
    ("cp", "2", None, ERROR, "context_parallel_size: 2"),
    ("ep_size", "4", None, ERROR, "moe_expert_parallel_size: 4"),
    ("ep", "4", None, ERROR, "moe_expert_parallel_size: 4"),
    ("expert_parallel_size", "4", None, ERROR, "moe_expert_parallel_size: 4"),
    ("moe_ep_size", "4", None, ERROR, "moe_expert_parallel_size: 4"),
    ("moe_tp_size", "4", None, ERROR, "moe_tensor_parallel_size: 4"),
    ("cluster_size", "1", "1.2.1", ERROR, "moe_cluster_parallel_size: 1"),
    ("model_path", "a/b", None, ERROR, "model: a/b"),
    ("max_model_len", "8192", None, ERROR, "max_seq_len: 8192"),
    ("kv_block_size", "64", None, ERROR, "kv_cache_config: {tokens_per_block: 64}"),
    ("kv_cache_config.kv_cache_dtype", "fp8", None, ERROR, "dtype: fp8 (under kv_cache_config)"),
    ("enable_kv_cache_reuse", "true", None, ERROR, "kv_cache_config: {enable_block_reuse: true}"),
    ("enable_chunked_context", "true", None, ERROR, "enable_chunked_prefill: true"),
    ("attention_backend", "TRTLLM", None, ERROR, "attn_backend: TRTLLM"),
    ("disable_cuda_graph", "true", None, ERROR, "cuda_graph_config: null"),
    (
        "speculative_config.pytorch_weights_path",
        "a/b",
        "1.0",
        ERROR,
        "speculative_model_dir: a/b (under speculative_config)",
    ),
    (
        "speculative_config.pytorch_weights_path",
        "a/b",
        None,
        ERROR,
        "speculative_model: a/b (under speculative_config)",
    ),
    ("backend", "tensorrt", NEWEST, ERROR, "backend: pytorch"),
    (
        "moe_config.backend",
        "WIDEEP",
        NEWEST,
        ERROR,
        "backend: AUTO (under moe_config); or DEEPGEMM for FP8 block scales on SM100, CUTLASS for them on SM90, "
        "TRTLLM or CUTEDSL for NVFP4",
    ),
    ("cache_transceiver_config.backend", "ucx", None, WARNING, "backend: UCX (under cache_transceiver_config)"),
    ("cache_transceiver_config.backend", "default", "1.1", ERROR, "backend: DEFAULT (under cache_transceiver_config)"),
    ("sampler_type", "TRTLLMSampler", NEWEST, ERROR, "remove the line; there is one sampler, TorchSampler"),
]


@pytest.mark.parametrize(("path", "value", "version", "severity", "fix"), ROWS)
def test_every_renamed_key_has_its_line(
    path: str, value: str, version: str | None, severity: Severity, fix: str
) -> None:
    finding = only(nested(path, value), version)
    assert (finding.severity, finding.fix) == (severity, fix)
    assert path in finding.message
    assert finding.found == f"{path}: {value}"
    assert finding.expected


def test_every_row_is_tested() -> None:
    assert KEYS.renamed.keys() | KEYS.removed_values.keys() == {row[0] for row in ROWS}


@pytest.mark.parametrize("row", [row for row in ROWS if row[4][0] != "r" and "(" not in row[4] and ";" not in row[4]])
def test_the_line_is_yaml_and_accepted(row: tuple[str, str, str | None, Severity, str]) -> None:
    *_, version, _, fix = row
    assert errors(check(fix, version)) == []


@pytest.mark.parametrize("row", RENAMED)
def test_new_names_are_keys(row: Renamed) -> None:
    if row.new:
        section, _, name = row.new.rpartition(".")
        assert name in KEYS.keys_of(section)
    if row.refused:
        parse_trtllm_version(row.refused if "." in row.refused else row.refused + ".0")
    parse_trtllm_version(row.since)


@pytest.mark.parametrize("section", [section for section in KEYS.sections if section])
def test_sections_are_keys_of_theirs(section: str) -> None:
    above, _, name = section.rpartition(".")
    assert name in KEYS.keys_of(above)


@pytest.mark.parametrize("section", list(KEYS.sections))
def test_keys_are_listed_once(section: str) -> None:
    lines = json.loads(KEYS_FILE.read_text(encoding="utf-8"))["sections"][section]
    assert len(" ".join(lines).split()) == len(KEYS.keys_of(section))


@pytest.mark.parametrize("section", list(KEYS.sections))
def test_without_a_version_every_key_is_accepted(section: str) -> None:
    for key in KEYS.keys_of(section):
        path = f"{section}.{key}" if section else key
        assert errors(check(nested(path, "null"), None)) == [], path


@pytest.mark.parametrize(
    ("text", "version", "severity", "message"),
    [
        ("kv_cache_dtype: fp8", "1.0.0rc4", WARNING, "refused from TensorRT-LLM 1.0 on, and this is 1.0.0rc4"),
        ("enable_mixed_sampler: true", "1.0", WARNING, "refused from TensorRT-LLM 1.1 on, and this is 1.0"),
        ("moe_config: {backend: WIDEEP}", "1.2.1", WARNING, "refused from TensorRT-LLM 1.3.0rc25 on"),
        ("moe_config: {backend: WIDEEP}", "1.3.0rc24", WARNING, "refused from TensorRT-LLM 1.3.0rc25 on"),
        ("sampler_type: TRTLLMSampler", "1.2.1", WARNING, "`sampler_type: TRTLLMSampler` is refused"),
        ("cache_transceiver_config: {backend: nixl}", "1.0", WARNING, "refused from TensorRT-LLM 1.1 on"),
        ("sparse_attention_config: {algorithm: dsa}", "1.0.3", ERROR, "known from TensorRT-LLM 1.1 on, and this is"),
        ("multimodal_config: {}", "1.2.1", ERROR, "known from TensorRT-LLM 1.3 on, and this is 1.2.1"),
        ("moe_config: {disable_finalize_fusion: true}", "1.0", ERROR, "`moe_config.disable_finalize_fusion` is known"),
        ("fail_fast_on_attention_window_too_large: true", "1.2.0rc1", WARNING, "refused from TensorRT-LLM 1.2 on"),
        ("fail_fast_on_attention_window_too_large: true", "1.2.0", ERROR, "refused from TensorRT-LLM 1.2 on"),
        ("kv_cache_config: {sink_token_length: 4}", "1.3.0rc29", WARNING, "deprecated from TensorRT-LLM 1.3 on"),
    ],
)
def test_versions_count(text: str, version: str, severity: Severity, message: str) -> None:
    finding = only(text, version)
    assert finding.severity is severity
    assert message in finding.message


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("multimodal_config: {video_pruning_rate: 0.5}", "1.3.0rc2"),
        ("sampler_type: TRTLLMSampler", "1.3.0"),
        ("sampler_type: auto", "1.2.1"),
        ("torch_compile_config: {enable_piecewise_cuda_graph: true}", "1.2.1"),
        ("speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 3}", "1.2.1"),
        ("cp_config: {anything: 1}", "1.2.1"),
        ("cp_config: {anything: 1}", None),
        ("model_kwargs: {anything: {at: all}}", "1.2.1"),
        ("env_overrides: {NCCL_DEBUG: INFO}", "1.2.1"),
        ("speculative_config: {draft_len_schedule: {4: 4, 8: 2}}", "1.3.0rc20"),
        ("moe_config: {load_balancer: {num_slots: 288, initial_global_assignments: {3: [0, 1]}}}", "1.0"),
        ("moe_config: {load_balancer: /mnt/eplb.yaml}", "1.0"),
        ("cuda_graph_config: null", "1.0"),
        ("kv_cache_config: 3", "1.0"),
        ("{backend: _autodeploy, transforms: {insert_cached_attention: {}}}", "1.2.1"),
    ],
)
def test_accepted(text: str, version: str | None) -> None:
    assert [finding for finding in check(text, version) if "TRTLLMSampler" not in finding.found] == []


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("tensor_paralel_size: 8", "`tensor_paralel_size` is not a key", "tensor_parallel_size: 8"),
        ("kv_cache_config: {dytpe: fp8}", "`kv_cache_config.dytpe` is not a key", "dtype: fp8 (under kv_cache_config)"),
        ("max-batch-size: 8", "`max-batch-size` is not a key", "max_batch_size: 8"),
        ("maxBatchSize: 8", "`maxBatchSize` is not a key", "max_batch_size: 8"),
        ("Max_Batch_Size: 8", "`Max_Batch_Size` is not a key", "max_batch_size: 8"),
        ("tp-size: 8", "`tp-size` is not a key", "tensor_parallel_size: 8"),
        (
            "free_gpu_memory_fraction: 0.9",
            "`free_gpu_memory_fraction` belongs under kv_cache_config",
            "kv_cache_config: {free_gpu_memory_fraction: 0.9}",
        ),
        (
            "free-gpu-memory-fraction: 0.9",
            "belongs under kv_cache_config, as `free_gpu_memory_fraction`",
            "kv_cache_config: {free_gpu_memory_fraction: 0.9}",
        ),
        (
            "kv_cache_config.dtype: fp8",
            "`kv_cache_config.dtype` belongs under kv_cache_config, as `dtype`",
            "kv_cache_config: {dtype: fp8}",
        ),
        (
            "kv_cache_config: {tensor_parallel_size: 8}",
            "`kv_cache_config.tensor_parallel_size` belongs at the top level",
            "tensor_parallel_size: 8",
        ),
        (
            "moe_config: {num_slots: 288}",
            "`moe_config.num_slots` belongs under moe_config.load_balancer",
            "load_balancer: {num_slots: 288} (under moe_config)",
        ),
        ("drafter_config: {drafter_endpoint: dyn://x}", "`drafter_config` is not a key", "remove the line"),
        ("zzz: 1", "`zzz` is not a key", "remove the line"),
        ("1: 2", "a key of the engine config is not text", "remove the line, or put the key in quotes if it is one"),
        ("kv_cache_config: {true: 2}", "a key of kv_cache_config is not text", "remove the line, or put the key"),
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.2.1", NEWEST, None])
def test_unknown_keys(text: str, message: str, fix: str, version: str | None) -> None:
    finding = only(text, version)
    assert finding.severity is ERROR
    assert message in finding.message
    assert finding.fix.startswith(fix)


def test_a_version_newer_than_the_lists_only_warns() -> None:
    finding = only("key_of_tomorrow: 1", "1.4")
    assert finding.severity is WARNING
    assert finding.message.endswith(f"as far as known here up to {NEWEST}")
    assert only("kv_cache_dtype: fp8", "1.4").severity is ERROR


def test_what_goes_into_one_section_is_written_once() -> None:
    text = "use_cuda_graph: true\ncuda_graph_batch_sizes: [1, 2]\ncuda_graph_padding_enabled: true"
    line = "cuda_graph_config: {batch_sizes: [1, 2], enable_padding: true}"
    assert [finding.fix for finding in check(text, "1.2.1")] == [line] * 3
    text = "kv_cache_dtype: fp8\nfree_gpu_memory_fraction: 0.9"
    line = "kv_cache_config: {dtype: fp8, free_gpu_memory_fraction: 0.9}"
    assert [finding.fix for finding in check(text, "1.2.1")] == [line] * 2


def test_a_section_that_is_there_is_filled() -> None:
    assert (
        only("kv_cache_dtype: fp8\nkv_cache_config: {max_tokens: 5}", None).fix == "dtype: fp8 (under kv_cache_config)"
    )
    assert only("kv_cache_dtype: fp8\nkv_cache_config: {}", None).fix == "kv_cache_config: {dtype: fp8}"


def test_what_is_set_already_is_dropped() -> None:
    fix = only("kv_cache_dtype: fp8\nkv_cache_config: {dtype: fp8}", None).fix
    assert fix == "remove the line: `kv_cache_config.dtype` is there already"


def test_the_old_backend_section_is_flattened() -> None:
    text = (
        "pytorch_backend_config: {enable_overlap_scheduler: true, use_cuda_graph: true, cuda_graph_batch_sizes: [1], "
        "kv_cache_dtype: fp8, attn_backend: TRTLLM, nonsense: 1}"
    )
    findings = check(text, "1.2.1")
    assert findings[0].fix.split("\n") == [
        "disable_overlap_scheduler: false",
        "cuda_graph_config: {batch_sizes: [1]}",
        "kv_cache_config: {dtype: fp8}",
        "attn_backend: TRTLLM",
    ]
    assert [finding.found.partition(":")[0] for finding in findings[1:]] == [
        "pytorch_backend_config.enable_overlap_scheduler",
        "pytorch_backend_config.use_cuda_graph",
        "pytorch_backend_config.cuda_graph_batch_sizes",
        "pytorch_backend_config.kv_cache_dtype",
        "pytorch_backend_config.nonsense",
    ]
    assert errors(check(findings[0].fix, "1.2.1")) == []


def test_keys_of_the_engine_backend_are_its_own() -> None:
    (finding,) = check("{backend: tensorrt, fast_build: true, build_config: {max_batch_size: 8}, own: 1}", "1.2.1")
    assert finding.found == "backend: tensorrt"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 100, "x" * 57 + "..."),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16..."),
        ("yes", "'yes'"),
        ("a: b", "'a: b'"),
        ("12", "'12'"),
        ("", "''"),
        (1.5, "1.5"),
        (float("inf"), ".inf"),
        (None, "null"),
        ({"a": [True, {}]}, "{a: [true, {}]}"),
    ],
)
def test_values_are_shown_as_yaml(value: object, shown: str) -> None:
    (finding,) = check_keys({"zzz": value}, None)
    assert finding.found == f"zzz: {shown}"


def test_numbers_beyond_printing_are_named() -> None:
    (finding,) = check_keys({"zzz": 10**5000}, None)
    assert finding.found == "zzz: <a very large number>"


def test_long_values_are_left_to_be_copied() -> None:
    sizes = list(range(300))
    (finding,) = check_keys({"cuda_graph_batch_sizes": sizes}, None)
    assert yaml.safe_load(finding.fix) == {"cuda_graph_config": {"batch_sizes": sizes}}
    (finding,) = check_keys({"cuda_graph_batch_sizes": list(range(10_000))}, None)
    assert finding.fix == "cuda_graph_config: {batch_sizes: <the value that is there>}"


def test_anchors_that_hold_themselves_come_to_an_end() -> None:
    text = "a: &a [*a, *a]\nkv_cache_config: &k {b: *k}\npytorch_backend_config: &p {pytorch_backend_config: *p}"
    assert all(len(finding.message) < 200 for finding in check(text, None))
    layers: Any = "x"
    for _ in range(40):
        layers = [layers] * 9
    (finding,) = check_keys({"kv_cache_dtype": layers}, None)
    assert finding.fix == "kv_cache_config: {dtype: <the value that is there>}"


def test_hundreds_of_unknown_keys_are_counted() -> None:
    findings = check_keys({f"qqq{number}": number for number in range(500)}, None)
    assert len(findings) == 21
    assert findings[-1].message == "480 more unknown keys"
    assert findings[-1].severity is ERROR
    findings = check_keys({f"qqq{number}": number for number in range(21)}, parse_trtllm_version("1.4"))
    assert (findings[-1].message, findings[-1].severity) == ("1 more unknown key", WARNING)


@pytest.mark.parametrize("key", ["", "x" * 100_000, "a\nb", "\x1b[31mred", "\ud800", "ключ", "a.b.c", ".", "a b"])
def test_odd_keys_are_shown_short_and_printable(key: str) -> None:
    (finding,) = check_keys({key: 1}, None)
    for text in (finding.message, finding.found):
        assert text.isprintable()
        assert len(text) < 140


NAMES = st.one_of(
    st.sampled_from([name for section in KEYS.sections for name in KEYS.keys_of(section)]),
    st.sampled_from([part for row in RENAMED for part in row.old.split(".")]),
    st.text(max_size=12),
    st.integers(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=5)),
    max_leaves=20,
)


@given(st.dictionaries(NAMES, VALUES, max_size=8), st.sampled_from(VERSIONS))
def test_any_mapping_gives_findings(config: dict[Any, object], version: str | None) -> None:
    findings = check_keys(config, None if version is None else parse_trtllm_version(version))
    for finding in findings:
        assert finding.rule == "H"
        assert finding.message
        assert finding.fix
        assert len(finding.found) <= 200
    assert len(findings) <= 21 + 20 * len(RENAMED)


ENGINE_CONFIG = """
backend: pytorch
model: meta-llama/Llama-3.1-8B-Instruct
tensor_parallel_size: 16
moe_expert_parallel_size: 16
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: true
trust_remote_code: true
max_batch_size: 256
max_num_tokens: 512
max_seq_len: 8448
enable_chunked_prefill: true
disable_overlap_scheduler: false
kv_cache_config: {free_gpu_memory_fraction: 0.3, dtype: fp8, enable_block_reuse: false, event_buffer_max_size: 1024}
cuda_graph_config: {enable_padding: true, batch_sizes: [1, 2, 4]}
moe_config: {backend: TRTLLM}
cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 16384}
scheduler_config: {capacity_scheduler_policy: MAX_UTILIZATION, dynamic_batch_config: {enable_batch_size_tuning: true}}
speculative_config: {decoding_type: Eagle, max_draft_len: 1, eagle3_one_model: false}
lora_config: {lora_ckpt_source: hf, max_lora_rank: 64, max_loras: 2, max_cpu_loras: 2, lora_target_modules: [attn_q]}
print_iter_log: true
stream_interval: 10
"""


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "0.20"])
def test_a_usual_config_has_nothing_to_say(version: str | None) -> None:
    assert check(ENGINE_CONFIG, version) == []
