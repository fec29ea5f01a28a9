# SPDX-License-Identifier: Apache-2.0
"""Rule J: does it fit, and what to do where it doesn't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dynamo_mpi.layout.engine_config import EngineConfig, KvCache
from dynamo_mpi.layout.finding import Finding, Severity, errors
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.memory import estimate
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.rules.capacity import RULES, check_capacity
from dynamo_mpi.layout.rules.registry import layout_findings
from tests.unit.test_weights import shape_of


def check(
    shape: ModelShape | str, nodes: int = 1, gpus: int = 8, gpu: str | None = "h100", requests: int = 1, **keys: Any
) -> list[Finding]:
    shape = shape_of(shape) if isinstance(shape, str) else shape
    worker = LayoutSpec(shape, EngineConfig(**keys), Cluster(nodes, gpus, gpu), min_requests=requests)
    found = list(check_capacity(worker))
    assert all(finding.rule == "J" for finding in found)
    return found


def only(shape: ModelShape | str, **keys: Any) -> Finding:
    (finding,) = check(shape, **keys)
    return finding


def test_it_is_among_the_rules() -> None:
    assert (check_capacity,) == RULES


def test_nothing_is_said_where_the_gpu_is_not_known() -> None:
    assert check("Llama-3.1-405B", gpu=None, tp_size=1) == []


def test_what_a_config_does_not_say_is_named() -> None:
    finding = only(replace(shape_of("Llama-3.1-8B"), hidden_size=None, intermediate_size=None))
    assert finding.severity is Severity.INFO
    assert "hidden_size, intermediate_size" in finding.found


def test_weights_that_are_too_large_stop_it() -> None:
    finding = only("Llama-3.1-405B", tp_size=8)
    assert finding.severity is Severity.ERROR
    assert "94.5 GiB on a GPU of 79.6 GiB" in finding.message
    assert "ranks 0 to 7: 14.8 GiB too much" in finding.found
    # which layouts would do is for the suggestions to say
    assert finding.fix == "take a checkpoint in FP8 or NVFP4, divide it over more GPUs, or take GPUs with more memory"


def test_a_quantised_checkpoint_gets_no_quantisation_argument() -> None:
    finding = only("DeepSeek-R1", gpus=4, tp_size=4, moe_ep_size=4)
    assert finding.severity is Severity.ERROR
    assert finding.fix == "divide it over more GPUs, or take GPUs with more memory"


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp_size": 8, "moe_ep_size": 16},
        {"tp_size": 8, "moe_tp_size": 3, "moe_ep_size": 2},
        {"tp_size": 1, "pp_size": 62},
        {"tp_size": 1, "moe_cluster_size": 2},
    ],
)
def test_a_layout_that_cannot_be_is_not_estimated(sizes: dict[str, Any]) -> None:
    config = EngineConfig(**sizes)
    worker = LayoutSpec(shape_of("DeepSeek-R1"), config, Cluster(1, config.world_size, "h100"))
    assert estimate(worker) is None
    assert check("DeepSeek-R1", gpus=config.world_size, **sizes) == []
    assert {"A2", "F3"} & {finding.rule for finding in errors(layout_findings(worker))}


def test_a_stage_is_named_where_there_are_several() -> None:
    finding = only("Llama-3.1-405B", nodes=2, tp_size=4, pp_size=2, pp_partition=(60, 66))
    assert "stage 1 (ranks 4 to 7)" in finding.found


def test_weights_that_leave_nothing_only_warn() -> None:
    finding = only("DeepSeek-R1", tp_size=8)
    assert finding.severity is Severity.WARNING
    assert finding.message.startswith("by estimate nothing is left for the KV cache: about")
    assert "weights 79.3 GiB" in finding.found
    assert finding.expected == "room for a block of 32 tokens"
    assert finding.fix == "divide it over more GPUs, or take GPUs with more memory, or lower max_num_tokens"


def test_steps_that_are_larger_than_the_weights_are_the_first_to_shrink() -> None:
    finding = only("Llama-3.1-8B", gpus=1, max_num_tokens=4_000_000)
    assert finding.severity is Severity.WARNING
    assert finding.message.startswith("by estimate nothing is left for the KV cache")
    assert finding.fix == "lower max_num_tokens"
    assert only("Llama-3.1-8B", gpus=1, max_num_tokens=8192).severity is Severity.INFO


@pytest.mark.parametrize(
    ("cache", "found"),
    [
        (KvCache(free_gpu_memory_fraction=0.0), "free_gpu_memory_fraction 0;"),
        (KvCache(free_gpu_memory_fraction=1e-6), "free_gpu_memory_fraction 1e-06;"),
        (KvCache(max_tokens=31), "free_gpu_memory_fraction 0.9, max_tokens 31;"),
        (KvCache(max_tokens=127, tokens_per_block=128), "free_gpu_memory_fraction 0.9, max_tokens 127;"),
    ],
)
def test_a_cache_that_the_config_leaves_no_block_to(cache: KvCache, found: str) -> None:
    finding = only("Llama-3.1-8B", gpus=1, kv_cache=cache)
    assert finding.severity is Severity.WARNING
    assert finding.message.startswith("kv_cache_config leaves no block to the KV cache, though ")
    assert finding.found.startswith(found)
    assert finding.expected == f"room for a block of {cache.tokens_per_block or 32} tokens"
    assert finding.fix == "raise kv_cache_config.free_gpu_memory_fraction and leave max_tokens out"


def test_a_block_is_enough_to_be_a_cache() -> None:
    finding = only("Llama-3.1-8B", gpus=1, max_seq_len=32, kv_cache=KvCache(max_tokens=32))
    assert (finding.severity, "room for about 32 tokens" in finding.message) == (Severity.INFO, True)


def test_a_request_that_does_not_fit_is_a_warning_with_the_length_that_does() -> None:
    finding = only("Llama-3.1-70B", gpus=2, tp_size=2)
    assert finding.severity is Severity.WARNING
    assert "not one request of 131072 tokens fits" in finding.message
    assert "kv_cache_config.dtype: fp8" in finding.fix
    length = int(finding.fix.split("at most ")[1].split(",")[0])
    assert only("Llama-3.1-70B", gpus=2, tp_size=2, max_seq_len=length).severity is Severity.INFO


@pytest.mark.parametrize("name", ["Gemma-3-27B", "gpt-oss-120b", "Llama-4-Scout-17B-16E"])
def test_the_length_that_fits_counts_windows_too(name: str) -> None:
    gpus, tp_size = (1, 1) if name != "Llama-4-Scout-17B-16E" else (4, 4)
    finding = only(name, gpus=gpus, tp_size=tp_size, max_seq_len=40_000_000)
    length = int(finding.fix.split("at most ")[1].split(",")[0]) // 32 * 32
    assert only(name, gpus=gpus, tp_size=tp_size, max_seq_len=length - 32).severity is Severity.INFO


def test_how_many_requests_must_fit_can_be_set() -> None:
    assert only("Llama-3.1-8B", gpus=1, requests=3).severity is Severity.INFO
    finding = only("Llama-3.1-8B", gpus=1, requests=4)
    assert finding.severity is Severity.WARNING
    assert "only 3 requests of 131072 tokens fit" in finding.message


def test_what_fits_is_said_in_a_line() -> None:
    finding = only("DeepSeek-R1", gpu="h200", tp_size=8, moe_ep_size=8, enable_attention_dp=True)
    assert finding.severity is Severity.INFO
    assert finding.message.endswith("in each rank's own cache")
    assert "70272 bytes of KV per token" in finding.found
