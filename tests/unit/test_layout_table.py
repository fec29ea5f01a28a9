# SPDX-License-Identifier: Apache-2.0
"""Layouts of public models, each with the rules that it breaks: worked out by hand and from the engine's sources, not from the rules here.

``tests/data/expected_layouts.csv`` has every model at every size, `CASES` what takes more than a size, `PAIRS` prefill beside decode.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.layout.contract import check_contracts, contract_of
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.finding import Finding, Severity, errors
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.report import Report, check_pair, check_worker, exit_code_of
from dynamo_mpi.layout.report_text import describe_report
from dynamo_mpi.layout.rules.registry import all_findings, layout_findings
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.unit.model_zoo import QUANT_FILES, ZOO

TABLE = Path(__file__).resolve().parents[1] / "data" / "expected_layouts.csv"

# what no public checkpoint of the zoo has
OTHERS: dict[str, dict[str, Any]] = {
    "small MLA": {
        **{key: value for key, value in ZOO["DeepSeek-R1"].items() if key != "quantization_config"},
        "num_hidden_layers": 5,
    },
    "odd MLP, gcd family": ZOO["DeepSeek-R1"] | {"intermediate_size": 18433},
    "Llama NVFP4": ZOO["Llama-3.1-8B"] | {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}},
    "Llama NVFP4, odd": ZOO["Llama-3.1-8B"]
    | {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}, "intermediate_size": 14400},
    "Llama AWQ": ZOO["Llama-3.1-8B"] | {"quantization_config": {"quant_method": "awq", "group_size": 128}},
    "Llama FP8": ZOO["Llama-3.1-70B"] | {"quantization_config": {"quant_algo": "FP8", "quant_method": "modelopt"}},
    "encoder-decoder": ZOO["Llama-3.1-8B"]
    | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
    "wide heads": ZOO["Llama-3.1-8B"] | {"head_dim": 260},
    "narrow heads": ZOO["Llama-3.1-8B"] | {"head_dim": 24},
}


def shape_of(model: str) -> ModelShape:
    quant_file = json.dumps(QUANT_FILES[model]) if model in QUANT_FILES else None
    return parse_model_shape(json.dumps((ZOO | OTHERS)[model]), "config.json", quant_file)


def rules(findings: list[Finding], severity: Severity) -> set[str]:
    return {finding.rule for finding in findings if finding.severity is severity}


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("model", sorted({row["model"] for row in rows()}))
def test_every_size_of_every_model(model: str) -> None:
    shape = shape_of(model)
    changed = []
    for row in rows():
        if row["model"] != model:
            continue
        tp = int(row["tp"])
        moe_tp, moe_ep = (tp if row["experts"] == name else None for name in ("tp", "ep"))
        config = EngineConfig(tp, moe_tp_size=moe_tp, moe_ep_size=moe_ep)
        # one node, however large: whether groups leave it isn't this table's matter
        found = layout_findings(LayoutSpec(shape, config, Cluster(1, tp)))
        rules_found = (rules(found, Severity.ERROR), rules(found, Severity.WARNING))
        if rules_found != (set(row["errors"].split()), set(row["warnings"].split())):
            now = ",".join((model, row["tp"], row["experts"], *(" ".join(sorted(each)) for each in rules_found)))
            changed.append(f"  {','.join(row.values())}\n  now: {now}")
    if changed:
        problem = "the rules differ from tests/data/expected_layouts.csv, which is worked out from the engine's sources"
        fix = "correct the rules; or the rows, if those sources agree, and say why in the commit"
        pytest.fail("\n".join((problem, *changed, f"  fix: {fix}")), pytrace=False)


def test_the_table_is_whole() -> None:
    table = rows()
    assert len(table) == 390
    assert {row["model"] for row in table} == set(ZOO)
    assert len({(row["model"], row["tp"], row["experts"]) for row in table}) == len(table)


class Case(NamedTuple):
    """A worker, the rules that it breaks, and some of those that warn."""

    model: str
    engine: str
    nodes: int
    gpus: int
    errors: str = ""
    warnings: str = ""
    gpu: str | None = None
    role: str = "agg"
    version: str | None = None


MAVERICK = "Llama-4-Maverick-17B-128E"
R1 = "DeepSeek-R1"
LLAMA = "Llama-3.1-8B"
LLAMA_70B = "Llama-3.1-70B"
NEXT = "Qwen3-Next-80B-A3B"
UCX = "cache_transceiver_config: {backend: UCX}\n"
NIXL = "cache_transceiver_config: {backend: NIXL, transceiver_runtime: PYTHON}\n"
TP2 = "tensor_parallel_size: 2\n"
TP4 = "tensor_parallel_size: 4\n"
TP8 = "tensor_parallel_size: 8\n"
TP16 = "tensor_parallel_size: 16\n"
TP32 = "tensor_parallel_size: 32\n"
ADP = "enable_attention_dp: true\n"
EP8 = "moe_expert_parallel_size: 8\n"
EP16 = "moe_expert_parallel_size: 16\n"
EP32 = "moe_expert_parallel_size: 32\n"
FLASHMLA = "attn_backend: FLASHMLA\n"
HELIX = "context_parallel_size: 2\ncp_config: {cp_type: HELIX}\n"


def balancer(text: str) -> str:
    return f"moe_config: {{load_balancer: {text}}}\n"


def cp(kind: str) -> str:
    return f"context_parallel_size: 2\ncp_config: {{cp_type: {kind}}}\n"


def helix_blocks(tokens: int) -> str:
    return f"context_parallel_size: 2\ncp_config: {{cp_type: HELIX, tokens_per_block: {tokens}}}\n"


def kv(text: str) -> str:
    return f"kv_cache_config: {{{text}}}\n"


CASES = [
    # heads
    Case(MAVERICK, TP16, 2, 8, "B1", "A14 B4"),
    Case(MAVERICK, TP8, 1, 8),
    Case(MAVERICK, TP16 + ADP, 2, 8),
    Case(MAVERICK, TP16 + ADP + EP16, 2, 8),
    Case(MAVERICK, TP16 + EP16, 2, 8, "B1", "A14"),
    Case(MAVERICK, TP8 + "pipeline_parallel_size: 2", 2, 8),
    Case("Phi-4", TP8, 1, 8, "B3"),
    Case("Phi-4", TP4, 1, 4, "B3"),
    Case("Phi-4", "tensor_parallel_size: 5", 1, 5),
    Case("SmolLM2-135M", TP2, 1, 2, "B1 B3"),
    Case(R1, "tensor_parallel_size: 3", 1, 3, "B2 D5"),
    Case("Qwen3-235B-A22B", TP8, 1, 8, "", "B4"),
    Case("wide heads", TP8, 1, 8, "", "B8"),
    Case("narrow heads", TP8, 1, 8, "", "B8"),
    Case("encoder-decoder", TP16, 2, 8, "B6", "B4"),
    Case("encoder-decoder", TP4 + "pipeline_parallel_size: 2", 1, 8, "F5"),
    # DeepSeek-V4's output groups, and its cache
    Case("DeepSeek-V4-Pro", TP16 + EP16, 2, 8, "", "B4"),
    Case("DeepSeek-V4-Pro", TP32 + EP32, 4, 8, "B7"),
    Case("DeepSeek-V4-Flash", TP16 + EP16, 2, 8, "B7"),
    Case("DeepSeek-V4-Flash", TP16 + EP16 + ADP, 2, 8),
    Case("DeepSeek-V4-Pro", TP8 + EP8 + "pipeline_parallel_size: 2", 2, 8, "F7"),
    # hybrids
    Case(NEXT, TP8 + EP8, 1, 8, "", "B4"),
    Case(NEXT, TP32 + EP32, 4, 8, "B1 B10"),
    Case(NEXT, TP32 + EP32 + ADP, 4, 8),
    Case("Nemotron-3-Nano-30B-A3B", TP16 + EP16, 2, 8, "B10", "B4"),
    Case("Nemotron-3-Nano-30B-A3B", TP8 + EP8, 1, 8, "", "B4"),
    # the world, and its division over experts
    Case(LLAMA, TP8, 2, 8, "A1"),
    Case(LLAMA, TP16, 1, 8, "A1", "B4"),
    Case(LLAMA, TP4, 1, 8),
    Case(LLAMA, TP4, 2, 8, "A1"),
    Case(R1, TP8 + EP16, 1, 8, "A2"),
    Case(MAVERICK, TP8 + EP16, 1, 8, "A2"),
    Case(R1, TP16 + "moe_expert_parallel_size: 6", 2, 8, "A2 D1"),
    Case(LLAMA, TP4 + "moe_expert_parallel_size: 3", 1, 4, "A2", "A3"),
    Case(LLAMA, TP4 + "moe_expert_parallel_size: 4", 1, 4, "", "A3"),
    Case(LLAMA, TP4 + "moe_tensor_parallel_size: 4", 1, 4, "", "A3"),
    Case(R1, TP16 + EP8, 2, 8, "", "A14"),
    Case(R1, TP8 + "moe_tensor_parallel_size: 2\nmoe_expert_parallel_size: 4", 1, 8),
    Case(R1, TP8 + "moe_tensor_parallel_size: -1\nmoe_expert_parallel_size: -1", 1, 8),
    Case(R1, TP8 + "moe_cluster_parallel_size: 2\nmoe_expert_parallel_size: 2", 1, 8, "A6", version="1.2.1"),
    Case(R1, TP8 + "moe_cluster_parallel_size: 2\nmoe_config: {backend: TRTLLM}", 1, 8, "D7", version="1.2.1"),
    Case(R1, TP8 + "moe_cluster_parallel_size: 2", 1, 8, "", "H", version="1.3.0rc25"),
    Case(LLAMA, TP8 + "enable_lm_head_tp_in_adp: true", 1, 8, "A7"),
    Case(R1, TP8 + ADP + "enable_lm_head_tp_in_adp: true", 1, 8),
    Case(LLAMA_70B, TP16 + "gpus_per_node: 4", 2, 8, "A10"),
    Case(LLAMA_70B, TP4 + "gpus_per_node: 2", 1, 8, "A10"),
    Case(LLAMA_70B, TP4 + "gpus_per_node: 8", 1, 4),
    Case(LLAMA_70B, TP8 + "gpus_per_node: 8", 2, 4, "A10", "A14"),
    Case(LLAMA_70B, TP8 + "gpus_per_node: 4", 2, 4, "", "", gpu="gb200"),
    # experts
    Case("Qwen3-30B-A3B", "tensor_parallel_size: 5\n" + ADP, 1, 5, "D5"),
    Case("Qwen3-30B-A3B", "tensor_parallel_size: 3\nmoe_expert_parallel_size: 3\n" + ADP, 1, 3, "D1"),
    Case(R1, TP32 + ADP, 4, 8, "D6", "C4"),
    Case(R1, TP16 + ADP, 2, 8),
    Case("gpt-oss-120b", TP4, 1, 4, "", "D6"),
    Case("gpt-oss-120b", TP4 + "moe_expert_parallel_size: 4", 1, 4),
    Case(R1, TP8 + "moe_config: {backend: FASTEST}", 1, 8, "D8"),
    Case(R1, TP8 + ADP + EP8 + balancer("{num_slots: 288}"), 1, 8),
    Case(R1, TP8 + ADP + EP8 + balancer("{num_slots: 260}"), 1, 8, "D2"),
    Case(R1, TP8 + ADP + EP8 + balancer("{layer_updates_per_iter: 2}"), 1, 8, "D2"),
    Case(R1, TP8 + ADP + EP8 + balancer("{num_slots: 248}"), 1, 8, "D3"),
    Case(R1, TP8 + ADP + EP8 + balancer("{num_slots: 252}"), 1, 8, "D2 D3"),
    Case(R1, TP8 + EP8 + balancer("{num_slots: 288}"), 1, 8, "C6"),
    Case(R1, TP8 + ADP + balancer("{num_slots: 288}"), 1, 8, "C6"),
    Case(R1, TP8 + ADP + EP8 + balancer("/nowhere/slots.yaml"), 1, 8, "", "D4"),
    Case(R1, TP8 + ADP + EP8 + "load_format: GMS\n" + balancer("{num_slots: 288}"), 1, 8, "D14"),
    Case(R1, TP8 + ADP + EP8 + "dwdp_config: {dwdp_size: 2}\n" + balancer("{num_slots: 288}"), 1, 8, "D13"),
    Case("Qwen3-30B-A3B", TP4 + ADP + EP8, 1, 4, "A2"),
    Case(R1, TP32 + ADP + EP32 + "max_num_tokens: 8192", 4, 8, "", "C4"),
    Case(R1, TP32 + ADP + EP32 + "max_num_tokens: 1024", 4, 8),
    # context parallelism
    Case(LLAMA, TP2 + cp("SPIRAL"), 1, 4, "A8"),
    Case(LLAMA, TP2 + cp("ULYSSES"), 1, 4, "B5"),
    Case(LLAMA, TP2 + "context_parallel_size: 2", 1, 4, "B5"),
    Case(LLAMA, TP2 + cp("star"), 1, 4, "B5"),
    Case(LLAMA, TP2 + cp("RING"), 1, 4, "B5"),
    Case(R1, TP4 + cp("ULYSSES") + "moe_expert_parallel_size: 4", 1, 8, "A5 B5"),
    Case(R1, TP4 + HELIX + EP8 + UCX, 1, 8, "A2 A5", role="decode", version="1.1.0"),
    Case(R1, TP4 + HELIX + "moe_expert_parallel_size: 4\n" + UCX, 1, 8, "A5", role="decode", version="1.1.0"),
    Case(R1, TP4 + HELIX + UCX, 1, 8, role="decode", version="1.1.0"),
    Case(R1, TP4 + HELIX + EP8 + UCX, 1, 8, role="decode", version="1.2.1"),
    # FlashMLA has blocks of its own, whatever the config says
    Case(R1, TP8 + FLASHMLA + helix_blocks(64) + UCX, 2, 8, role="decode"),
    Case(R1, TP8 + FLASHMLA + helix_blocks(32) + UCX, 2, 8, "F9", role="decode"),
    Case(R1, TP8 + FLASHMLA + helix_blocks(32) + UCX + kv("tokens_per_block: 32"), 2, 8, "F9", "H8", role="decode"),
    Case(R1, TP8 + helix_blocks(32) + UCX, 2, 8, role="decode"),
    Case(LLAMA, TP2 + HELIX, 1, 4, "F9"),
    Case(LLAMA, TP2 + HELIX + UCX, 1, 4, "F9", role="prefill"),
    Case(LLAMA, TP2 + HELIX + UCX, 1, 4, "", "F13", role="decode"),
    Case(R1, TP4 + HELIX + EP8 + UCX, 1, 8, "", "F13", gpu="h200", role="decode"),
    Case(
        R1,
        TP4 + HELIX + EP8 + UCX + "speculative_config: {decoding_type: MTP, max_draft_len: 1}",
        1,
        8,
        "",
        "F13",
        role="decode",
    ),
    Case(R1, TP8 + HELIX + EP16 + UCX, 2, 8, "", "A14", role="decode"),
    Case(R1, TP8 + HELIX + EP16 + UCX, 4, 4, "", "", gpu="gb200", role="decode"),
    Case(MAVERICK, TP8 + HELIX + UCX, 2, 8, "B1", role="decode"),
    Case("Qwen3-32B-FP8", TP8 + HELIX + UCX, 2, 8, "E4", role="decode"),
    Case(
        LLAMA,
        TP2 + "context_parallel_size: 2\ncp_config: {cp_type: HELIX, tokens_per_block: 64}\n" + UCX,
        1,
        4,
        "F9",
        role="decode",
    ),
    Case(
        LLAMA,
        TP2
        + "context_parallel_size: 2\ncp_config: {cp_type: HELIX, tokens_per_block: 64}\n"
        + UCX
        + kv("tokens_per_block: 64"),
        1,
        4,
        role="decode",
    ),
    # pipeline stages
    Case(LLAMA_70B, TP4 + "pipeline_parallel_size: 2\npp_partition: [30, 50]", 1, 8),
    Case(LLAMA_70B, TP4 + "pipeline_parallel_size: 2\npp_partition: [40, 41]", 1, 8, "F2"),
    Case(LLAMA_70B, TP4 + "pipeline_parallel_size: 2\npp_partition: [40, 20, 20]", 1, 8, "F2"),
    Case(LLAMA_70B, TP4 + "pipeline_parallel_size: 2\npp_partition: [40, 40]", 1, 8, "H", version="1.1.0"),
    Case("Qwen3-0.6B", "pipeline_parallel_size: 32", 4, 8, "F3"),
    Case("Qwen3-0.6B", "pipeline_parallel_size: 28", 7, 4),
    # dense layers
    Case("Qwen3-32B-FP8", TP16, 2, 8, "E4", "A14 B4"),
    Case("Qwen3-32B-FP8", TP16 + ADP, 2, 8),
    Case("Qwen3-32B-FP8", TP8, 1, 8),
    Case("Llama NVFP4", TP8, 1, 8),
    Case("Llama NVFP4, odd", TP8, 1, 8, "E5"),
    Case("Llama NVFP4, odd", TP4, 1, 4),
    Case("Llama AWQ", TP32, 4, 8, "E6"),
    Case("Llama AWQ", TP16, 2, 8, "", "A14 B4"),
    Case(R1, TP16 + EP16, 2, 8, "", "A14"),
    Case("odd MLP, gcd family", TP8 + EP8, 1, 8, "E9"),
    # attention DP
    Case(LLAMA, TP8 + ADP, 1, 8, "", "C1"),
    Case(LLAMA, TP8 + ADP + "lora_config: {cuda_graph_specialize_lora: true}", 1, 8, "C5", "C1"),
    Case(R1, TP8 + ADP + "attention_dp_config: {enable_balance: true, timeout_iters: -1}", 1, 8, "C7", version="1.2.1"),
    Case(R1, TP8 + ADP + "attention_dp_config: {enable_balance: true, timeout_iters: 10}", 1, 8, version="1.2.1"),
    # kinds of GPU
    Case("Qwen3-32B-FP8", TP4, 1, 4, "G", gpu="a100"),
    Case("Qwen3-32B-FP8", TP4, 1, 4, gpu="h100"),
    Case("gpt-oss-120b", TP4 + "moe_expert_parallel_size: 4", 1, 4, "G", gpu="a100"),
    Case("Llama NVFP4", TP8, 1, 8, "G", gpu="h100"),
    Case("Llama NVFP4", TP8, 1, 8, gpu="b200"),
    Case(R1, TP8 + EP8 + "moe_config: {backend: CUTLASS}", 1, 8, "G", gpu="b200"),
    Case(R1, TP8 + EP8 + "moe_config: {backend: TRTLLM}", 1, 8, gpu="b200"),
    Case(R1, TP8 + EP8 + "moe_config: {backend: TRTLLM}", 1, 8, "", "D9", gpu="h200"),
    Case(R1, TP16 + EP16 + "moe_config: {backend: TRTLLM}", 2, 8, "", "G3", gpu="rtx-pro-6000", version="1.3.0rc20"),
    Case(R1, TP16 + EP16 + "moe_config: {backend: TRTLLM}", 2, 8, "G3", gpu="rtx-pro-6000", version="1.2.1"),
    Case(LLAMA, kv("dtype: fp8"), 1, 1, "", "G", gpu="a100"),
    Case(LLAMA, kv("dtype: nvfp4"), 1, 1, "G", "G", gpu="h100"),
    Case(LLAMA, kv("dtype: fp8"), 1, 1, gpu="l40s"),
    Case(LLAMA, kv("dtype: fp7"), 1, 1, "G1"),
    Case(LLAMA, kv("dtype: fp8_ds_mla"), 1, 1, "G"),
    Case(LLAMA, "use_cute_dsl_blockscaling_mm: true", 1, 1, "G2", gpu="h100", version="1.2.1"),
    Case("small MLA", TP8, 1, 8, "", "G4", gpu="l40s"),
    Case("small MLA", TP8, 1, 8, gpu="h100"),
    Case(
        "DeepSeek-V3.2",
        TP8 + EP8 + "sparse_attention_config: {algorithm: dsa, indexer_k_dtype: fp4}",
        1,
        8,
        "G5",
        gpu="h200",
    ),
    # memory
    Case("Llama-3.1-405B", TP8, 1, 8, "J", gpu="h100"),
    Case(R1, TP8 + EP8, 1, 8, "", "J", gpu="h100"),
    Case(R1, TP4 + "moe_expert_parallel_size: 4", 1, 4, "J", gpu="h100"),
    Case(LLAMA, kv("max_tokens: 16"), 1, 1, "", "J", gpu="h100"),
    Case(LLAMA, kv("free_gpu_memory_fraction: 0"), 1, 1, "", "J", gpu="h100"),
    # what can't be isn't estimated
    Case(R1, TP4 + EP8, 1, 4, "A2", gpu="h100"),
    Case("Qwen3-0.6B", "pipeline_parallel_size: 32", 4, 8, "F3", gpu="h100"),
    Case(LLAMA_70B, TP2, 1, 2, "", "J", gpu="h100"),
    Case(LLAMA, "max_batch_size: 8", 1, 1, gpu="h100"),
    # known bugs of releases
    Case("Llama FP8", TP4 + "pipeline_parallel_size: 2", 1, 8, "", "F11", version="1.0.0"),
    Case(LLAMA, TP2, 2, 1, "", "F11", version="1.0.0"),
    Case(
        LLAMA,
        "pipeline_parallel_size: 2\ndisable_overlap_scheduler: true\n" + UCX,
        1,
        2,
        "",
        "F11",
        role="prefill",
        version="1.0.0",
    ),
    # limits
    Case(LLAMA, "cuda_graph_config: {batch_sizes: [1, 2, 64], max_batch_size: 128}", 1, 1, "H1"),
    Case(LLAMA, "cuda_graph_config: {batch_sizes: [1, 2, 128], max_batch_size: 128}", 1, 1),
    Case(LLAMA, "cuda_graph_config: {batch_sizes: [1, 2, 128], max_batch_size: 128}", 1, 1, "H1", version="1.1.0"),
    Case(
        LLAMA,
        "cuda_graph_config: {batch_sizes: [1, 2, 4, 8, 12], max_batch_size: 12, enable_padding: true}",
        1,
        1,
        version="1.1.0",
    ),
    Case(LLAMA, "max_batch_size: 512\nmax_num_tokens: 256", 1, 1, "", "H2"),
    Case(LLAMA, "max_seq_len: 32768\nmax_num_tokens: 8192", 1, 1, "", "H3"),
    Case(LLAMA, "max_seq_len: 32768\nmax_num_tokens: 8192\nenable_chunked_prefill: true", 1, 1),
    Case(LLAMA, kv("free_gpu_memory_fraction: 1.0"), 1, 1, "H5"),
    Case(LLAMA, kv("free_gpu_memory_fraction: -0.1"), 1, 1, "H5"),
    Case(LLAMA, kv("free_gpu_memory_fraction: 0.0"), 1, 1),
    Case(LLAMA, kv("max_attention_window: []"), 1, 1, "H6"),
    Case(LLAMA, kv("max_attention_window: [4096, 0]"), 1, 1, "H6"),
    Case(LLAMA, "max_seq_len: 200000\nenable_chunked_prefill: true", 1, 1, "", "H7"),
    Case(R1, TP8 + EP8 + "attn_backend: FLASHMLA\n" + kv("tokens_per_block: 32"), 1, 8, "", "H8"),
    Case(
        LLAMA,
        "kv_connector_config: {connector_module: m, connector_scheduler_class: s, connector_worker_class: w}\n"
        "scheduler_config: {capacity_scheduler_policy: MAX_UTILIZATION}",
        1,
        1,
        "H10",
    ),
    Case(R1, TP8 + EP8 + "speculative_config: {decoding_type: MTP, max_draft_len: 0}", 1, 8, "H12"),
    Case(R1, TP8 + EP8 + "speculative_config: {decoding_type: MTP, max_draft_len: 1}", 1, 8),
    Case(LLAMA, "speculative_config: {decoding_type: NGram}", 1, 1, "", "H12"),
    Case(LLAMA, "speculative_config: {decoding_type: NGram}", 1, 1, "H12", version="1.2.1"),
    Case(LLAMA, "speculative_config: {decoding_type: NGram}", 1, 1, version="1.1.0"),
    Case(LLAMA, "speculative_config: {decoding_type: AUTO, max_draft_len: 0}", 1, 1, version="1.2.1"),
    Case(LLAMA, "speculative_config: {decoding_type: MTP, max_draft_len: 1}", 1, 1, "", "H12"),
    Case(LLAMA, "speculative_config: {decoding_type: Eagle, max_draft_len: 3}", 1, 1, "H12"),
    Case(LLAMA, "orchestrator_type: ray", 1, 1, "H15", version="1.2.1"),
    Case(LLAMA, "orchestrator_type: mpi", 1, 1, "H15", version="1.2.1"),
    Case(LLAMA, TP2 + "orchestrator_type: rpc", 1, 2, "H15", version="1.2.1"),
    Case(LLAMA, "backend: _autodeploy\nworld_size: 2\norchestrator_type: rpc", 1, 2, "H15", version="1.2.1"),
    Case(LLAMA, "orchestrator_type: rpc", 1, 1, version="1.2.1"),
    Case(LLAMA, "orchestrator_type: null", 1, 1, version="1.2.1"),
    # keys
    Case(LLAMA, "pytorch_backend_config: {enable_overlap_scheduler: true}", 1, 1, "H"),
    Case(LLAMA, "kv_cache_dtype: fp8", 1, 1, "H"),
    Case(LLAMA, "use_cuda_graph: true", 1, 1, "H", version="1.0.0"),
    Case(LLAMA, "tensor_paralel_size: 1", 1, 1, "H"),
    Case(LLAMA, "tp_size: 8", 1, 8, "H"),
    Case(LLAMA, "tp_size: 16", 2, 8, "A1 H"),
    Case(LLAMA, "enable_sleep: true", 1, 1, "", "H", version="1.2.1"),
    Case(LLAMA, "enable_sleep: true", 1, 1, "H", version="1.3.0rc20"),
    Case(LLAMA, "sampler_type: TorchSampler", 1, 1, "H", version="1.0.0"),
    Case(LLAMA, "sampler_type: TorchSampler", 1, 1, version="1.1.0"),
    Case(LLAMA, "backend: tensorrt", 1, 1, "", "H", version="1.2.1"),
    Case(LLAMA, "backend: tensorrt", 1, 1, "H", version="1.3.0rc29"),
    Case(R1, TP8 + EP8 + "moe_config: {backend: WIDEEP}", 1, 8, "", "H", version="1.2.1"),
    Case(R1, TP8 + EP8 + "moe_config: {backend: WIDEEP}", 1, 8, "H", version="1.3.0rc29"),
    # roles
    Case(LLAMA, TP2, 1, 2, "I6", role="decode"),
    Case(LLAMA, TP2 + "cache_transceiver_config: {backend: PIGEON}", 1, 2, "H", role="decode"),
    Case(LLAMA, TP2 + "cache_transceiver_config: {backend: DEFAULT}", 1, 2, "", "I6", role="decode"),
    Case(LLAMA, TP2 + "cache_transceiver_config: {backend: ucx}", 1, 2, "H", role="decode", version="1.2.1"),
    Case(
        LLAMA,
        TP2 + "cache_transceiver_config: {backend: UCX, transceiver_runtime: PYTHON}",
        1,
        2,
        "I7",
        role="decode",
    ),
    Case(LLAMA, TP2 + NIXL, 1, 2, role="decode"),
    Case(
        LLAMA,
        TP2 + "cache_transceiver_config: {backend: NIXL, transceiver_runtime: PYTHON, kv_transfer_timeout_ms: null}",
        1,
        2,
        "I7",
        role="decode",
    ),
    Case(NEXT, TP8 + EP8 + "cache_transceiver_config: {backend: NIXL}", 1, 8, "", "I5", role="decode"),
    Case(NEXT, TP8 + EP8 + "cache_transceiver_config: {backend: NIXL}", 1, 8, "", "I5", role="decode", version="1.2.1"),
    Case(NEXT, TP8 + EP8 + "cache_transceiver_config: {backend: NIXL}", 1, 8, "I5", role="decode", version="1.1.0"),
    Case(
        NEXT,
        TP8 + EP8 + "cache_transceiver_config: {backend: NIXL, transceiver_runtime: CPP}",
        1,
        8,
        "I5",
        role="decode",
    ),
    Case(NEXT, TP8 + EP8 + NIXL, 1, 8, role="decode"),
    Case(LLAMA, TP2 + UCX, 1, 2, "I9", role="prefill", version="1.2.1"),
    Case(LLAMA, TP2 + UCX, 1, 2, "", "I9", role="prefill", version="1.3.0rc20"),
    Case(LLAMA, TP2 + UCX, 1, 2, "", "I9", role="prefill"),
    Case(LLAMA, TP2 + UCX + "disable_overlap_scheduler: true", 1, 2, role="prefill", version="1.2.1"),
    Case(LLAMA, TP2 + UCX + "max_beam_width: 4", 1, 2, "I10", role="decode"),
    Case(LLAMA, TP2 + "max_beam_width: 4", 1, 2),
    Case("encoder-decoder", TP2 + UCX, 1, 2, "I10", role="decode"),
]


def subject_of(case: Case) -> LayoutSpec:
    config = merge(EngineLayers(yaml_text=case.engine or "{}", yaml_path="engine.yaml")).config
    version = None if case.version is None else parse_trtllm_version(case.version)
    return LayoutSpec(shape_of(case.model), config, Cluster(case.nodes, case.gpus, case.gpu), case.role, version)


def name_of(case: Case) -> str:
    engine = "; ".join(case.engine.split("\n")).strip("; ")
    where = [f"{case.nodes}x{case.gpus}", case.gpu, case.version, None if case.role == "agg" else case.role]
    return ", ".join([case.model, engine, *(word for word in where if word)])


def test_graphs_above_max_batch_size_are_dropped() -> None:
    engine = "max_batch_size: 8\ncuda_graph_config: {enable_padding: true, batch_sizes: [1, 2, 4, 8, 16, 32]}"
    (finding,) = (finding for finding in all_findings(subject_of(Case(LLAMA, engine, 1, 1))) if finding.rule == "H1")
    assert finding.severity is Severity.INFO
    assert finding.message.endswith("are dropped, not captured: 16, 32")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_wrong_and_nothing_else(case: Case) -> None:
    found = all_findings(subject_of(case))
    assert rules(found, Severity.ERROR) == set(case.errors.split())
    assert set(case.warnings.split()) <= rules(found, Severity.WARNING)
    for finding in errors(found):
        assert finding.found and finding.expected and finding.fix, finding


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (Case(LLAMA, TP4, 1, 8), "A1"),
        (Case(LLAMA_70B, TP8 + "pipeline_parallel_size: 2", 2, 8), "A10"),
        (Case(LLAMA, "attn_backend: FLASHINFER", 1, 1), "H8"),
        (Case(LLAMA, "attn_backend: FLASHINFER\n" + kv("tokens_per_block: 64"), 1, 1), "H8"),
        (Case(R1, TP8 + ADP, 1, 8), "C2"),
        (Case(LLAMA, "max_num_tokens: 8192", 1, 1, gpu="h100"), "J"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Case) else str(value),
)
def test_what_is_good_to_know(case: Case, rule: str) -> None:
    assert rule in rules(all_findings(subject_of(case)), Severity.INFO)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (Case(LLAMA, TP8, 1, 8), "A1"),
        (Case(LLAMA_70B, TP8 + "pipeline_parallel_size: 2\ngpus_per_node: 8", 2, 8), "A10"),
        (Case(LLAMA_70B, TP8, 1, 8), "A10"),
        # a world that is smaller than its node: rank // gpus_per_node is 0 either way
        (Case(LLAMA_70B, TP4 + "gpus_per_node: 4", 1, 8), "A10"),
        (Case(LLAMA_70B, TP4 + "gpus_per_node: 16", 1, 8), "A10"),
        (Case(LLAMA, "attn_backend: FLASHINFER\n" + kv("enable_block_reuse: false"), 1, 1), "H8"),
        (Case(LLAMA, "attn_backend: TRTLLM", 1, 1), "H8"),
        (Case(R1, TP8 + EP8, 1, 8), "A3"),
        (Case(LLAMA, TP8 + "moe_expert_parallel_size: 1", 1, 8), "A3"),
        (Case(LLAMA, ADP, 1, 1), "C1"),
        (Case(R1, TP8 + ADP, 1, 8), "C1"),
        (Case("Gemma-3-27B", TP8, 1, 8), "B8"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Case) else str(value),
)
def test_what_is_not_said(case: Case, rule: str) -> None:
    assert rule not in {finding.rule for finding in all_findings(subject_of(case))}


def test_the_reference_engine_has_no_nodes_to_reckon() -> None:
    case = Case(LLAMA_70B, TP16 + "gpus_per_node: 4", 2, 8)
    for engine, rules_found in (("trtllm", {"A10", "A14"}), ("reference", set())):
        found = layout_findings(replace(subject_of(case), engine=engine))
        assert {finding.rule for finding in found} & {"A10", "A14"} == rules_found


def test_the_cases_differ() -> None:
    assert len({name_of(case) for case in CASES}) == len(CASES) >= 60


def worker(model: str, engine: str, nodes: int, gpus: int, role: str = "agg", version: str | None = None) -> Report:
    return check_worker(subject_of(Case(model, engine, nodes, gpus, role=role, version=version)))


def test_more_experts_parallel_than_ranks_get_the_setting_that_was_meant() -> None:
    report = worker(R1, TP8 + EP16, 1, 8)
    (finding,) = errors(report.findings)
    assert "TP16/EP16 with attention DP" in finding.fix
    assert "TP8/EP8/PP2" in finding.fix
    assert "TP8 x CP2 helix/EP16" in finding.fix
    assert "on these 8 ranks set moe_expert_parallel_size to one of 1, 2, 4, 8" in finding.fix
    offered = [other.layout for other in report.nearest]
    assert [layout.world_size for layout in offered[:4]] == [16, 16, 16, 16]
    assert "16 ranks" in describe_report("R1", report)


@pytest.mark.parametrize("role", ["agg", "decode"])
def test_heads_that_context_ranks_cannot_share_are_not_offered_to_them(role: str) -> None:
    report = worker(MAVERICK, TP8 + EP16 + UCX, 1, 8, role)
    (finding,) = errors(report.findings)
    assert "TP16/EP16 with attention DP" in finding.fix
    assert "helix" not in finding.fix
    # 40 heads over 16 ranks; fewer of them, on the same GPUs, are a decode worker's choice
    assert all(not other.layout.is_helix or 40 % other.layout.head_split == 0 for other in report.nearest)
    assert role == "decode" or not any(other.layout.is_helix for other in report.nearest)


@pytest.mark.parametrize("case", [case for case in CASES if case.errors], ids=name_of)
def test_what_is_offered_instead_works(case: Case) -> None:
    for other in check_worker(subject_of(case)).nearest:
        assert errors(layout_findings(other)) == []
        assert other.layout.world_size == other.cluster.world_size


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_both_who_ask_get_the_same_exit_code(case: Case) -> None:
    """`check` and the preflight, which has codes of its own for some rules."""
    subject = subject_of(case)
    report = check_worker(subject, suggest=False)
    found = all_findings(subject)
    assert report.exit_code == exit_code_of(found) == exit_code_of(found, {"A0": ExitCode.ENGINE})
    broken = [finding.rule for finding in errors(found) if finding.rule != "H"]
    if not errors(found):
        assert report.exit_code == ExitCode.OK
    elif not broken:
        assert report.exit_code == ExitCode.DATA
    else:
        assert report.exit_code == ExitCode.ILLEGAL_LAYOUT
        assert exit_code_of(found, {broken[0]: ExitCode.USAGE}) == ExitCode.USAGE
        others = dict.fromkeys({*broken[1:], "H"} - {broken[0]}, ExitCode.USAGE)
        assert exit_code_of(found, others) == ExitCode.ILLEGAL_LAYOUT
    assert report.ok == (report.exit_code == ExitCode.OK)


class Pair(NamedTuple):
    """Two workers of one model, and the rules that they break between them."""

    prefill: str
    decode: str
    errors: str = ""
    warnings: str = ""
    model: str = LLAMA
    versions: tuple[str | None, str | None] = (None, None)
    decode_model: str | None = None


PP2 = "pipeline_parallel_size: 2\n"
MLA = "DeepSeek-V3.2"
STATE_BF16 = kv("mamba_ssm_cache_dtype: bfloat16")
PAIRS = [
    # what must be the same (I1)
    Pair(TP2 + UCX, TP2 + UCX),
    Pair(TP2 + UCX + kv("dtype: fp8"), TP2 + UCX + kv("dtype: auto"), "I1"),
    Pair(TP2 + UCX + kv("dtype: fp8"), TP2 + UCX + kv("dtype: bfloat16"), "I1"),
    Pair(TP2 + UCX + kv("dtype: bfloat16"), TP2 + UCX + kv("dtype: auto")),
    Pair(TP2 + UCX + kv("dtype: half"), TP2 + UCX + kv("dtype: float16")),
    Pair(TP2 + UCX + kv("tokens_per_block: 32"), TP2 + UCX + kv("tokens_per_block: 64"), "I1"),
    Pair(TP2 + UCX, TP2 + UCX + kv("tokens_per_block: 32")),
    Pair(TP2 + UCX, TP2 + UCX + kv("tokens_per_block: 64"), "I1"),
    Pair(TP2 + UCX + "attn_backend: FLASHMLA", TP2 + UCX, "I1", model=MLA),
    Pair(TP2 + UCX + "attn_backend: FLASHMLA", TP2 + UCX + kv("tokens_per_block: 64"), model=MLA),
    Pair(TP2 + UCX + "attn_backend: VANILLA\nmax_num_tokens: 4096", TP2 + UCX, "I1"),
    Pair(TP2 + UCX, TP2 + UCX, "I1", decode_model=LLAMA_70B),
    Pair(TP2 + UCX, TP2 + UCX, "I1", model="Qwen3-8B", decode_model=LLAMA),
    Pair(TP2 + UCX, TP2 + UCX, "I1 I3", model=R1, decode_model=MLA),
    Pair(TP2 + UCX, TP2 + UCX, "I1 I5", model=NEXT, decode_model="Qwen3-8B"),
    Pair(TP2 + UCX + STATE_BF16, TP2 + UCX + kv("mamba_ssm_cache_dtype: float32"), "I5", model=NEXT),
    Pair(TP2 + UCX + STATE_BF16, TP2 + UCX + STATE_BF16, model=NEXT),
    Pair(TP2 + UCX + STATE_BF16, TP2 + UCX, model=NEXT),
    Pair(TP2 + UCX + STATE_BF16, TP2 + UCX + kv("mamba_ssm_cache_dtype: float32")),
    Pair(TP2 + UCX, TP2 + UCX, model=R1, decode_model="DeepSeek-V3"),
    # the way that it travels
    Pair(TP2 + UCX, TP2 + "cache_transceiver_config: {backend: NIXL}", "I6"),
    Pair(TP2 + "cache_transceiver_config: {backend: ucx}", TP2 + UCX),
    Pair(TP2 + NIXL, TP2 + "cache_transceiver_config: {backend: NIXL, transceiver_runtime: CPP}", "I7"),
    Pair(TP2 + NIXL, TP2 + "cache_transceiver_config: {backend: NIXL, transceiver_runtime: python}"),
    Pair(TP2 + UCX, TP2 + NIXL, "I6", "I7"),
    Pair(TP2 + NIXL, TP2 + "cache_transceiver_config: {backend: NIXL}", "", "I7"),
    Pair(TP2 + "cache_transceiver_config: {backend: DEFAULT}", TP2 + NIXL, "", "I6 I7"),
    Pair(TP2 + "cache_transceiver_config: {backend: DEFAULT}", TP2 + UCX, "I6"),
    # layouts and limits may differ (I2)
    Pair(TP2 + UCX, TP8 + UCX),
    Pair(TP8 + UCX, TP2 + PP2 + UCX, model=LLAMA_70B),
    Pair(TP8 + EP8 + UCX, TP16 + EP16 + ADP + UCX, model=R1),
    Pair(TP2 + UCX + "max_batch_size: 4", TP2 + UCX + "max_batch_size: 512\nmax_num_tokens: 512"),
    Pair(TP8 + EP8 + UCX, TP8 + HELIX + EP16 + UCX, model=R1),
    Pair(TP8 + HELIX + EP16 + UCX, TP8 + HELIX + EP16 + UCX, "I4", model=R1),
    # what only warns
    Pair(TP2 + PP2 + UCX, TP2 + UCX, "", "F11", versions=("1.2.1", "1.2.1")),
    Pair(TP2 + PP2 + UCX, TP2 + UCX, "", "F11", versions=("1.2.0rc2", "1.2.0rc2")),
    Pair(TP2 + PP2 + UCX, TP2 + UCX, versions=("1.1.0", "1.1.0")),
    Pair(TP2 + PP2 + UCX, UCX, versions=("1.2.1", "1.2.1")),
    Pair(TP2 + UCX, TP2 + PP2 + UCX, versions=("1.2.1", "1.2.1")),
    Pair(TP2 + UCX, TP2 + UCX, "", "I1", versions=("1.2.1", "1.3.0rc29")),
    Pair(TP2 + UCX, TP2 + UCX, versions=("1.2.1", None)),
    Pair(TP2 + UCX + "max_seq_len: 65536", TP2 + UCX + "max_seq_len: 32768", "", "I8"),
    Pair(TP2 + UCX + "max_seq_len: 32768", TP2 + UCX + "max_seq_len: 65536"),
    Pair(TP2 + UCX + "max_seq_len: 32768", TP2 + UCX),
    Pair(TP2 + UCX, TP2 + UCX + "max_seq_len: 32768"),
    Pair(
        "max_seq_len: 8192\ncache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 4096}",
        "max_seq_len: 8192\n" + UCX,
        "",
        "I8",
    ),
    Pair(
        "max_seq_len: 8192\ncache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 8192}",
        "max_seq_len: 8192\n" + UCX,
    ),
    Pair(
        "max_seq_len: 8192\ncache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 0}",
        "max_seq_len: 8192\n" + UCX,
    ),
]


def pair_of(pair: Pair) -> tuple[LayoutSpec, LayoutSpec]:
    sides = []
    models = (pair.model, pair.decode_model or pair.model)
    for role, engine, model, version in zip(
        ("prefill", "decode"), (pair.prefill, pair.decode), models, pair.versions, strict=True
    ):
        subject = subject_of(Case(model, engine, 1, 8, role=role, version=version))
        sides.append(subject)
    return sides[0], sides[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_wrong_between_two_workers(pair: Pair) -> None:
    prefill, decode = pair_of(pair)
    found = check_contracts(contract_of(prefill), contract_of(decode))
    assert rules(found, Severity.ERROR) == set(pair.errors.split())
    assert rules(found, Severity.WARNING) == set(pair.warnings.split())
    reports = (check_worker(prefill, suggest=False), check_worker(decode, suggest=False))
    between = check_pair(*reports)
    assert list(between.findings) == found
    codes = {report.exit_code for report in reports}
    expected = ExitCode.ILLEGAL_LAYOUT if errors(found) or ExitCode.ILLEGAL_LAYOUT in codes else max(codes)
    assert between.exit_code == expected
    assert between.ok == (expected == ExitCode.OK)
