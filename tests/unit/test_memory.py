# SPDX-License-Identifier: Apache-2.0
"""The estimate of memory: KV bytes of known models, what the layout does to them, and what fits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.layout.engine_config import EngineConfig, KvCache, Moe, Speculative
from dynamo_mpi.layout.gpus import GPUS
from dynamo_mpi.layout.kv_cache import kv_element_bytes
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.memory import MemoryEstimate, estimate
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.quantisation import Quantisation
from tests.unit.model_zoo import ZOO
from tests.unit.test_weights import FIELDS, shape_of


def subject(
    shape: ModelShape | str, nodes: int = 1, gpus: int = 8, gpu: str | None = "h100", **keys: Any
) -> LayoutSpec:
    shape = shape_of(shape) if isinstance(shape, str) else shape
    return LayoutSpec(shape, EngineConfig(**keys), Cluster(nodes, gpus, gpu))


def estimated(shape: ModelShape | str, **keys: Any) -> MemoryEstimate:
    found = estimate(subject(shape, **keys))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("Llama-3.1-70B", {"tp_size": 8}, 2 * 80 * 1 * 128 * 2),
        ("Llama-3.1-70B", {"tp_size": 8, "pp_size": 2}, 2 * 40 * 1 * 128 * 2),
        ("Llama-3.1-70B", {"tp_size": 16}, 2 * 80 * 1 * 128 * 2),
        ("Llama-3.1-70B", {"tp_size": 8, "kv_cache": KvCache(dtype="fp8")}, 2 * 80 * 128),
        ("Llama-3.1-70B", {"tp_size": 8, "kv_cache": KvCache(dtype="nvfp4")}, 80 * (128 + 16)),
        ("Llama-3.1-70B", {"tp_size": 8, "enable_attention_dp": True}, 2 * 80 * 8 * 128 * 2),
        ("Qwen3-235B-A22B", {"tp_size": 8}, 2 * 94 * 1 * 128 * 2),
        ("DeepSeek-R1", {"tp_size": 8}, 61 * 576 * 2),
        ("DeepSeek-R1", {"tp_size": 1}, 61 * 576 * 2),
        ("DeepSeek-R1", {"speculative": Speculative("MTP", max_draft_len=1)}, 62 * 576 * 2),
        ("DeepSeek-V3.2", {"tp_size": 8}, 61 * (576 * 2 + 132)),
        ("Qwen3-Next-80B-A3B", {"tp_size": 2}, 2 * 12 * 1 * 256 * 2),
        ("gpt-oss-120b", {"tp_size": 4}, 2 * 18 * 2 * 64 * 2),
        ("Nemotron-3-Super-120B-A12B-FP8", {}, 2 * 8 * 2 * 128),
    ],
)
def test_a_token_takes_what_the_engine_takes_for_it(name: str, keys: dict[str, Any], expected: int) -> None:
    assert estimated(name, nodes=4, **keys).stages[0].kv_bytes_per_token == expected


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("gpt-oss-120b", ((128, 18 * 2 * 8 * 64 * 2),)),
        ("Gemma-3-27B", ((1024, 52 * 2 * 16 * 128 * 2),)),
        ("Llama-4-Scout-17B-16E", ((8192, 36 * 2 * 8 * 128 * 2),)),
        ("Llama-3.1-8B", ()),
    ],
)
def test_layers_that_look_back_a_little_keep_no_more(name: str, windows: tuple[tuple[int, int], ...]) -> None:
    (stage,) = estimated(name).stages
    assert stage.windows == windows
    length = 100_000
    limited = sum(window * size for window, size in windows)
    assert stage.request_bytes(length) == length * stage.kv_bytes_per_token + limited


def test_the_engine_config_may_set_windows_by_layer() -> None:
    keys = {"kv_cache": KvCache(max_attention_window=(512, 4096)), "max_seq_len": 4096}
    (stage,) = estimated("Llama-3.1-8B", **keys).stages
    assert stage.kv_bytes_per_token == 16 * 2 * 8 * 128 * 2
    assert stage.windows == ((512, 16 * 2 * 8 * 128 * 2),)


def test_a_hybrid_keeps_a_state_of_each_request() -> None:
    (stage,) = estimated("Qwen3-Next-80B-A3B", tp_size=2).stages
    state, taps = 16 * 128 * 128 * 4, (32 * 128 + 2 * 16 * 128) // 2 * 3 * 2
    assert stage.state_bytes_per_request == 36 * (state + taps)
    assert stage.request_bytes(0) == stage.state_bytes_per_request


def test_the_cache_takes_the_format_that_the_checkpoint_was_calibrated_for() -> None:
    shape = shape_of("Llama-3.1-8B")
    calibrated = replace(shape, quantisation=Quantisation("NONE", kv_algo="FP8"))
    assert kv_element_bytes(subject(shape)) == 2
    assert kv_element_bytes(subject(calibrated)) == 1
    assert kv_element_bytes(subject(calibrated, kv_cache=KvCache(dtype="bfloat16"))) == 2
    assert kv_element_bytes(subject(replace(shape, dtype="float32"))) == 4


def test_tokens_are_what_is_left_over_what_one_takes() -> None:
    found = estimated("Llama-3.1-70B", tp_size=8)
    stage = found.fullest
    assert stage.left_bytes == GPUS["h100"].memory - stage.fixed_bytes
    assert found.tokens == int(stage.left_bytes * 0.9) // 40960 // 32 * 32
    assert found.full_length_requests == found.tokens // 131072
    assert found.fullest_rank == 0
    assert found.weights_total_bytes == pytest.approx(2 * 70.55e9, rel=0.01)


def test_the_fraction_is_the_callers_the_configs_or_the_engines() -> None:
    keys: dict[str, Any] = {"tp_size": 8, "kv_cache": KvCache(free_gpu_memory_fraction=0.45)}
    default, halved = estimated("Llama-3.1-70B", tp_size=8), estimated("Llama-3.1-70B", **keys)
    given_one = estimate(subject("Llama-3.1-70B", **keys), fraction=0.9)
    assert given_one is not None
    assert halved.tokens == pytest.approx((default.tokens or 0) / 2, rel=0.001)
    assert given_one.tokens == default.tokens


def test_max_tokens_limits_the_cache() -> None:
    assert estimated("Llama-3.1-70B", tp_size=8, kv_cache=KvCache(max_tokens=1000)).tokens == 1000


def test_the_fullest_stage_decides() -> None:
    found = estimated("Llama-3.1-405B", nodes=2, tp_size=8, pp_size=2, pp_partition=(60, 66))
    assert found.fullest_stage == 1
    assert found.fullest_rank == 8
    assert found.tokens == found.stages[1].tokens
    assert (found.stages[0].tokens or 0) > (found.tokens or 0)


def test_without_a_kind_of_gpu_the_stage_with_most_in_it_is_named() -> None:
    found = estimated("Llama-3.1-405B", gpu=None, tp_size=8, pp_size=2, pp_partition=(60, 66))
    assert found.fullest_stage == 1
    assert (found.tokens, found.full_length_requests, found.gpu_bytes) == (None, None, None)
    assert found.weights_fit
    assert found.cache_fits


def test_attention_dp_gives_each_rank_a_cache_of_its_own() -> None:
    found = estimated("DeepSeek-R1", gpu="h200", tp_size=8, moe_ep_size=8, enable_attention_dp=True)
    data = found.as_json()
    assert found.dp_size == 8
    assert data["tokens_of_all_ranks"] == 8 * data["tokens"] > 0
    assert data["full_length_requests_of_all_ranks"] == 8 * data["full_length_requests"]


def test_helix_spreads_the_tokens_of_a_request() -> None:
    plain = estimated("DeepSeek-R1", nodes=2, gpu="h200", tp_size=16)
    helix = estimated("DeepSeek-R1", nodes=2, gpu="h200", tp_size=4, cp_size=4, cp_type="HELIX")
    assert (helix.tokens or 0) > 3 * (plain.tokens or 0)
    assert helix.fullest.kv_bytes_per_token == plain.fullest.kv_bytes_per_token


def test_expert_workspace_grows_with_attention_dp_unless_it_is_limited() -> None:
    keys: dict[str, Any] = {"tp_size": 8, "moe_ep_size": 8}
    plain, whole = estimated("DeepSeek-R1", **keys), estimated("DeepSeek-R1", enable_attention_dp=True, **keys)
    limited = estimated("DeepSeek-R1", enable_attention_dp=True, moe=Moe(max_num_tokens=8192), **keys)
    assert whole.stages[0].workspace_bytes == 8 * plain.stages[0].workspace_bytes
    assert limited.stages[0].workspace_bytes == plain.stages[0].workspace_bytes == 4 * 8192 * 7168 * 256 * 8 // 8 // 128


@pytest.mark.parametrize(
    ("name", "tp_size", "factor"),
    [
        ("Llama-3.1-70B", 1, 11),
        ("Llama-3.1-70B", 2, 6.5),
        ("Llama-3.1-70B", 8, 5),
        ("Qwen2.5-72B", 1, 10),
        ("Qwen2.5-72B", 6, 5),
    ],
)
def test_activations_go_by_the_rule_of_thumb(name: str, tp_size: int, factor: float) -> None:
    assert (
        estimated(name, tp_size=tp_size, max_num_tokens=4096).stages[0].activation_bytes == 2 * 4096 * 64 * 128 * factor
    )


def test_cuda_graphs_can_be_done_without() -> None:
    with_graphs, one, without = (
        estimated("Llama-3.1-8B", **keys).stages[0].outside_bytes
        for keys in ({}, {"cuda_graph_batch_sizes": (1,)}, {"cuda_graphs": False})
    )
    assert with_graphs == without + 2**30
    assert one == without + int(0.2 * 2**30)


def test_it_is_plain_data_for_scripts() -> None:
    data = estimated("gpt-oss-120b", tp_size=2, pp_size=2).as_json()
    assert json.loads(json.dumps(data)) == data
    assert data["stages"][1]["windows"] == [{"tokens": 128, "bytes_per_token": 9 * 2 * 4 * 64 * 2}]
    assert isinstance(data["weights_total_bytes"], int)
    assert data["weights_total_bytes"] == sum(stage["weights_bytes"] * stage["ranks"] for stage in data["stages"])


def test_what_was_taken_for_granted_is_said() -> None:
    assert estimated("Llama-3.1-8B").assumptions == ()
    assert any("dtype" in text for text in estimated("gpt-oss-20b").assumptions)
    assert any("turbo3" in text for text in estimated("Llama-3.1-8B", kv_cache=KvCache(dtype="turbo3")).assumptions)
    shape = replace(shape_of("Gemma-3-27B"), context_length=None)
    found = estimated(shape)
    assert found.length is None
    assert found.full_length_requests is None
    assert any("longest request" in text for text in found.assumptions)


def test_a_config_that_does_not_say_enough_gives_no_estimate() -> None:
    assert estimate(subject(replace(shape_of("DeepSeek-V4-Pro"), head_dim=None))) is None


def test_a_kind_of_gpu_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="no kind of GPU"):
        estimate(subject("Llama-3.1-8B", gpu="h900"))


@given(
    name=st.sampled_from(sorted(ZOO)),
    gone=st.sets(st.sampled_from(FIELDS)),
    tp_size=st.integers(1, 9),
    pp_size=st.integers(1, 5),
)
def test_a_shape_with_holes_is_estimated_or_not_and_never_fatal(
    name: str, gone: set[str], tp_size: int, pp_size: int
) -> None:
    holes: dict[str, Any] = dict.fromkeys(gone)
    shape = replace(shape_of(name), **holes)
    found = estimate(subject(shape, tp_size=tp_size, pp_size=pp_size))
    assert found is None or json.dumps(found.as_json())


@pytest.mark.parametrize("name", ["Llama-3.1-405B", "DeepSeek-R1", "Qwen3-235B-A22B", "gpt-oss-120b"])
def test_a_larger_gpu_never_holds_less(name: str) -> None:
    tokens = [estimated(name, gpu=gpu, tp_size=8).tokens for gpu in ("l40s", "h100", "h200", "b200", "b300")]
    assert tokens == sorted(tokens, key=lambda count: count or 0)
