# SPDX-License-Identifier: Apache-2.0
"""Rule J: does it fit, and what to do where it doesn't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dynamo_mpi.parallelism.engine_config import EngineConfig
from dynamo_mpi.parallelism.finding import Finding, Severity
from dynamo_mpi.parallelism.layout import Cluster
from dynamo_mpi.parallelism.model_shape import ModelShape
from dynamo_mpi.parallelism.rules.capacity import RULES, check_capacity
from dynamo_mpi.parallelism.subject import Subject
from tests.unit.test_weights import shape_of


def check(
    shape: ModelShape | str, nodes: int = 1, gpus: int = 8, gpu: str | None = "h100", requests: int = 1, **keys: Any
) -> list[Finding]:
    shape = shape_of(shape) if isinstance(shape, str) else shape
    worker = Subject(shape, EngineConfig(**keys), Cluster(nodes, gpus, gpu), min_requests=requests)
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


def test_weights_that_are_too_large_stop_it_with_the_smallest_size_that_would_do() -> None:
    finding = only("Llama-3.1-405B", tp_size=8)
    assert finding.severity is Severity.ERROR
    assert "94.5 GiB on a GPU of 79.6 GiB" in finding.message
    assert "ranks 0 to 7: 14.8 GiB too much" in finding.found
    assert "tensor_parallel_size: 16, on 2 nodes x 8 GPUs" in finding.fix
    assert "FP8" in finding.fix


def test_a_larger_size_is_one_that_the_heads_allow() -> None:
    # 40 heads and 8 KV heads: after 1 and 2 comes 4, after 8 comes 40
    finding = only("Llama-4-Maverick-17B-128E", gpu="h100", tp_size=8)
    assert finding.severity is Severity.ERROR
    assert "tensor_parallel_size: 40" in finding.fix


def test_expert_parallelism_stays_what_it_is() -> None:
    finding = only("DeepSeek-R1", tp_size=8, moe_ep_size=8)
    assert "tensor_parallel_size: 16 and moe_expert_parallel_size: 16" in finding.fix


def test_a_stage_is_named_where_there_are_several() -> None:
    finding = only("Llama-3.1-405B", nodes=2, tp_size=4, pp_size=2, pp_partition=(60, 66))
    assert "stage 1 (ranks 4 to 7)" in finding.found


def test_weights_that_leave_nothing_stop_it_too() -> None:
    finding = only("DeepSeek-R1", tp_size=8)
    assert finding.severity is Severity.ERROR
    assert finding.message.startswith("nothing is left for the KV cache")
    assert "weights 79.3 GiB" in finding.found
    assert "max_num_tokens" in finding.fix


def test_a_model_whose_heads_allow_no_more_ranks_gets_pipeline_stages() -> None:
    stuck = replace(shape_of("Llama-3.1-70B"), attention_heads=1, kv_heads=1)
    finding = only(stuck, gpus=1)
    assert "pipeline_parallel_size: 2, on 2 nodes x 1 GPU" in finding.fix


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


def test_how_many_requests_have_to_fit_can_be_said() -> None:
    assert only("Llama-3.1-8B", gpus=1, requests=3).severity is Severity.INFO
    finding = only("Llama-3.1-8B", gpus=1, requests=4)
    assert finding.severity is Severity.WARNING
    assert "only 3 requests of 131072 tokens fit" in finding.message


def test_what_fits_is_said_in_a_line() -> None:
    finding = only("DeepSeek-R1", gpu="h200", tp_size=8, moe_ep_size=8, enable_attention_dp=True)
    assert finding.severity is Severity.INFO
    assert finding.message.endswith("in each rank's own cache")
    assert "70272 bytes of KV per token" in finding.found
