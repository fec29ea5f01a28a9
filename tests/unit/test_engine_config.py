# SPDX-License-Identifier: Apache-2.0
"""The engine config: TensorRT-LLM's YAML."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.engine_config import EngineConfig, KvCache
from dynamo_mpi.layout.engine_layers import EngineLayers, merge


def parse(text: str | None, **flags: int) -> EngineConfig:
    return merge(EngineLayers(flags, text, "/e.yaml")).config


@pytest.mark.parametrize("text", [None, "{}"])
def test_no_keys_leave_all_to_the_engine(text: str | None) -> None:
    assert parse(text) == EngineConfig()
    assert parse(text).world_size == 1


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "null"])
def test_an_empty_file_is_refused_as_by_the_engine(text: str) -> None:
    with pytest.raises(ConfigFileError, match=r"/e\.yaml is empty"):
        parse(text)


def test_every_key_is_read() -> None:
    config = parse(
        """
        backend: pytorch
        tensor_parallel_size: 4
        pipeline_parallel_size: 2
        context_parallel_size: 3
        enable_attention_dp: true
        max_batch_size: 16
        max_num_tokens: 1024
        max_seq_len: 4096
        kv_cache_config:
          tokens_per_block: 64
          free_gpu_memory_fraction: 0.8
        """
    )
    cache = KvCache(tokens_per_block=64, free_gpu_memory_fraction=0.8)
    assert config == EngineConfig(4, 2, 3, True, 16, 1024, 4096, kv_cache=cache)
    assert config.world_size == 24


def test_the_file_lies_over_the_flags_as_in_dynamo() -> None:
    config = parse("tensor_parallel_size: 4\nmax_batch_size: 16", tensor_parallel_size=8, max_seq_len=99)
    assert (config.tp_size, config.max_batch_size, config.max_seq_len) == (4, 16, 99)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "two", "false", "[2]", "'2x'", "{}"])
@pytest.mark.parametrize("key", ["tensor_parallel_size", "context_parallel_size", "max_batch_size", "max_seq_len"])
def test_a_size_is_a_positive_whole_number(key: str, value: str) -> None:
    with pytest.raises(ConfigFileError, match=f"/e.yaml, line 1: {key} is "):
        parse(f"{key}: {value}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{tensor_parallel_size: '2', max_batch_size: 8.0, max_num_tokens: '16.0'}", (2, 8, 16, False)),
        ("{tensor_parallel_size: true, enable_attention_dp: 1}", (1, None, None, True)),
        ("enable_attention_dp: 'yes'", (1, None, None, True)),
        ("{moe_expert_parallel_size: '-1', kv_cache_config: {free_gpu_memory_fraction: '.8'}}", (1, None, None, False)),
    ],
)
def test_values_are_converted_as_by_the_engine(text: str, expected: tuple[object, ...]) -> None:
    config = parse(text)
    assert (config.tp_size, config.max_batch_size, config.max_num_tokens, config.enable_attention_dp) == expected


def test_numbers_that_the_engine_doesnt_bound() -> None:
    config = parse(
        """
        cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 0, kv_transfer_timeout_ms: -1}
        kv_cache_config: {max_tokens: 0}
        moe_config: {max_num_tokens: -1}
        cuda_graph_config: {batch_sizes: [0, 1], max_batch_size: 0}
        speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 0}
        """
    )
    assert config.transceiver is not None and config.transceiver.max_tokens_in_buffer is None
    assert (config.kv_cache.max_tokens, config.moe.max_num_tokens) == (None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("enable_attention_dp: 2", "enable_attention_dp is 2"),
        ("enable_attention_dp: 'maybe'", "enable_attention_dp is 'maybe'"),
        ("pp_partition: [1, x]", "pp_partition is"),
        ("pp_partition: 3", "pp_partition is 3"),
        ("kv_cache_config: {free_gpu_memory_fraction: half}", "free_gpu_memory_fraction is 'half'"),
        ("kv_cache_config: 3", "kv_cache_config is 3"),
        ("kv_cache_config: [a]", "kv_cache_config is"),
        ("kv_cache_config: {tokens_per_block: 0}", "kv_cache_config.tokens_per_block is 0"),
        ("- a\n- b", "holds a list"),
        ("just words", "holds a str"),
        ("7", "holds a int"),
    ],
)
def test_impossible_values_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigFileError, match=words):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: 1\n  b: 2",
        "\ta: 1",
        "a: \0",
        "a: 1\n---\nb: 2",
        "a: *nowhere",
        "a: !!python/object:os.system x",
        "{[1]: 2}",
        # PyYAML lets these through as errors that aren't its own
        "a: 2024-13-45",
        "a: 0b_",
        "[" * 3000,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_yaml_is_refused(text: str) -> None:
    with pytest.raises(ConfigFileError, match=r"/e\.yaml is not YAML") as caught:
        parse(text)
    assert "\n" not in caught.value.problem


@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,?0x_ \n\t=.<~", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except ConfigFileError as error:
        assert "/e.yaml" in error.problem
