# SPDX-License-Identifier: Apache-2.0
"""Which layer does what, in the spelling of every family."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from dynamo_mpi.common.config_reader import ConfigReader
from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.layer_patterns import read_layers
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import Feed, Layer, Mixer
from dynamo_mpi.layout.quantisation import Quantisation
from dynamo_mpi.layout.quantisation_config import with_formats
from tests.unit.model_zoo import ZOO


def layers(
    count: int, experts: bool = True, quantisation: Quantisation | None = None, **body: Any
) -> tuple[Layer, ...]:
    found, unknown = read_layers(ConfigReader(body, "config.json"), count, experts=experts)
    assert found is not None
    assert unknown == ()
    return with_formats(found, quantisation)


def feeds(count: int, **body: Any) -> str:
    return "".join({Feed.EXPERTS: "E", Feed.DENSE: "-", Feed.NONE: "."}[layer.feed] for layer in layers(count, **body))


def mixers(count: int, **body: Any) -> str:
    letters = {Mixer.ATTENTION: "*", Mixer.MAMBA2: "M", Mixer.GATED_DELTA: "G", Mixer.NONE: "."}
    letters |= {Mixer.KIMI_DELTA: "K", Mixer.CONVOLUTION: "C"}
    return "".join(letters[layer.mixer] for layer in layers(count, experts=False, **body))


def windows(count: int, **body: Any) -> list[int | None]:
    return [layer.window for layer in layers(count, experts=False, **body)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Llama-3.1-8B", {("attention", "dense", None): 32}),
        ("DeepSeek-R1", {("attention", "dense", None): 3, ("attention", "experts", None): 58}),
        ("Kimi-K2", {("attention", "dense", None): 1, ("attention", "experts", None): 60}),
        ("GLM-4.5", {("attention", "dense", None): 3, ("attention", "experts", None): 89}),
        (
            "Llama-4-Maverick-17B-128E",
            {
                ("attention", "dense", 8192): 24,
                ("attention", "experts", 8192): 12,
                ("attention", "experts", None): 12,
            },
        ),
        ("Llama-4-Scout-17B-16E", {("attention", "experts", 8192): 36, ("attention", "experts", None): 12}),
        ("Qwen3-Next-80B-A3B", {("gated delta", "experts", None): 36, ("attention", "experts", None): 12}),
        ("Qwen3.5-397B-A17B", {("gated delta", "experts", None): 45, ("attention", "experts", None): 15}),
        ("gpt-oss-120b", {("attention", "experts", 128): 18, ("attention", "experts", None): 18}),
        ("Gemma-3-27B", {("attention", "dense", 1024): 52, ("attention", "dense", None): 10}),
        (
            "MiMo-V2-Flash",
            {("attention", "dense", None): 1, ("attention", "experts", 128): 39, ("attention", "experts", None): 8},
        ),
        (
            "Nemotron-3-Nano-30B-A3B",
            {("mamba2", "none", None): 23, ("none", "experts", None): 23, ("attention", "none", None): 6},
        ),
        ("Qwen2.5-72B", {("attention", "dense", None): 80}),
    ],
)
def test_public_models(model: str, expected: dict[tuple[str, str, int | None], int]) -> None:
    found = parse_model_shape(json.dumps(ZOO[model]), "config.json").layers or ()
    assert Counter((layer.mixer.value, layer.feed.value, layer.window) for layer in found) == expected


@pytest.mark.parametrize("model", list(ZOO))
def test_every_layer_of_every_model_is_known(model: str) -> None:
    shape = parse_model_shape(json.dumps(ZOO[model]), "config.json")
    assert shape.layers is not None
    assert len(shape.layers) == shape.num_layers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "EEEEEEEE"),
        ({"first_k_dense_replace": 3}, "---EEEEE"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "--E-E-E-"),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1, 0, 0]}, "-EE-EE--"),
        ({"moe_layers": [1, 7]}, "-E-----E"),
        ({"interleave_moe_layer_step": 2}, "-E-E-E-E"),
        ({"interleave_moe_layer_step": 1}, "EEEEEEEE"),
        ({"interleave_moe_layer_step": 0}, "--------"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "-E---E-E"),
        ({"decoder_sparse_step": 0}, "--------"),
        ({"mlp_only_layers": [0, 7]}, "-EEEEEE-"),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, "-E-E-E-E"),
        ({"expert_layer_period": 4}, "E---E---"),
        ({"moe_layer_start_index": 2}, "--EEEEEE"),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 2}, "---E-E--"),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": -1}, "EEEEEEEE"),
    ],
)
def test_which_layers_hold_experts(body: dict[str, Any], expected: str) -> None:
    assert feeds(8, **body) == expected
    assert feeds(8, experts=False, **body) == "--------"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "********"),
        ({"layer_types": ["linear_attention", "full_attention"] * 4, "linear_num_value_heads": 4}, "G*G*G*G*"),
        ({"layer_types": ["linear_attention", "full_attention"] * 4, "mamba_num_heads": 4}, "M*M*M*M*"),
        ({"layer_types": ["conv", "full_attention"] * 4}, "C*C*C*C*"),
        ({"layer_types": ["deepseek_sparse_attention", "indexed_attention"] * 4}, "********"),
        ({"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2}, "M.*.M.*."),
        ({"attn_type_list": [1] * 8}, "********"),
        ({"full_attn_idxs": [1, 7]}, "C*CCCCC*"),
        ({"attn_layer_indices": [2], "mamba_n_heads": 4}, "MM*MMMMM"),
        (
            {"linear_attn_config": {"kda_layers": [1, 2, 3, 5, 6, 7], "full_attn_layers": [4, 8]}},
            "KKK*KKK*",
        ),
        ({"layer_types": ["mamba", "attention", "mamba2", "sliding_attention"] * 2}, "M*M*M*M*"),
        ({"linear_num_value_heads": 4}, "GGG*GGG*"),
        ({"linear_num_value_heads": 4, "full_attention_interval": 2}, "G*G*G*G*"),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, "M*MMM*MM"),
        ({"attn_layer_period": 4, "mamba_n_heads": 2}, "*MMM*MMM"),
        ({"hybrid_override_pattern": "MM*-EM*E"}, "MM*..M*."),
    ],
)
def test_what_mixes_tokens(body: dict[str, Any], expected: str) -> None:
    assert mixers(8, **body) == expected


def test_nemotron_s_letters_say_both() -> None:
    assert feeds(8, hybrid_override_pattern="MM*-EM*E") == "...-E..E"


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"layer_types": ["full_attention", "telepathy"]}, "layer_types ('telepathy')"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types ('linear_attention')"),
        ({"layers_block_type": ["moe", "telepathy"]}, "layers_block_type ('telepathy')"),
        ({"hybrid_override_pattern": "MZ"}, "hybrid_override_pattern ('Z')"),
        ({"mamba_num_heads": 4}, "mamba_num_heads"),
        ({"mamba_n_heads": 4}, "mamba_n_heads"),
        ({"attn_type_list": [1, 0]}, "attn_type_list (0)"),
        ({"block_configs": [{"attention": {"no_op": True}, "ffn": {}}] * 2}, "block_configs.ffn.ffn_mult"),
        (
            {"block_configs": [{"attention": {}, "ffn": {"no_op": True}}] * 2},
            "block_configs.attention.n_heads_in_group",
        ),
        (
            {"block_configs": [{"attention": {"no_op": True}, "ffn": {"no_op": True}, "ssm": {}}] * 2},
            "block_configs.ssm",
        ),
    ],
)
def test_unknown_kinds_give_no_layers_and_their_key(body: dict[str, Any], key: str) -> None:
    assert read_layers(ConfigReader(body, "config.json"), 2, experts=False) == (None, (key,))


def test_unknown_kind_of_mlp_gives_its_key() -> None:
    body = {"mlp_layer_types": ["dense", "telepathy"]}
    assert read_layers(ConfigReader(body, "config.json"), 2, experts=True) == (None, ("mlp_layer_types ('telepathy')",))


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": [1, 2]}, "layer_types"),
        ({"hybrid_override_pattern": "M"}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": 3}, "hybrid_override_pattern"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq"),
        ({"moe_layer_freq": "1"}, "moe_layer_freq"),
        ({"moe_layers": "1,2"}, "moe_layers"),
        ({"moe_layers_enum": "1,x"}, "moe_layers_enum"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"layers_block_type": ["moe"]}, "layers_block_type"),
        ({"attn_type_list": [1]}, "attn_type_list"),
        ({"attn_type_list": [1, "1"]}, "attn_type_list"),
        ({"indexer_types": ["full"]}, "indexer_types"),
        ({"compress_ratios": [4]}, "compress_ratios"),
        ({"block_configs": [{}]}, "block_configs"),
        ({"block_configs": [1, 2]}, "block_configs"),
        ({"block_configs": [{"attention": 1}, {}]}, "block_configs"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config.kda_layers"),
        ({"hybrid_layer_pattern": [1], "sliding_window": 8}, "hybrid_layer_pattern"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step"),
    ],
)
def test_a_list_of_another_length_is_refused(body: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigFileError, match=f"config.json: {key} is "):
        layers(2, **body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, [None] * 6),
        ({"sliding_window": 8}, [8] * 6),
        ({"sliding_window": 0}, [None] * 6),
        ({"sliding_window": 8, "use_sliding_window": False}, [None] * 6),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, [None] * 4 + [8] * 2),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None] * 2),
        ({"sliding_window": 8, "global_attn_every_n_layers": 2}, [8, None] * 3),
        ({"sliding_window": 8, "model_type": "gemma3_text"}, [8] * 5 + [None]),
        ({"sliding_window": 8, "model_type": "gemma2"}, [8, None] * 3),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3},
            [8, None] * 3,
        ),
        (
            {"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"] * 3},
            [16, None] * 3,
        ),
        ({"sliding_window": 8, "layer_types": ["attention", "mamba"] * 3}, [8, None] * 3),
        # what is full is full, whatever window others might have
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 6}, [None] * 6),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "mamba"] * 3},
            [None] * 6,
        ),
        ({"sliding_window": 8, "hybrid_layer_pattern": [1, 0, 0, 1, 1, 0]}, [8, None, None, 8, 8, None]),
        ({"attention_chunk_size": 16, "model_type": "llama4_text"}, [16, 16, 16, None, 16, 16]),
        (
            {"attention_chunk_size": 16, "model_type": "llama4_text", "no_rope_layer_interval": 2},
            [16, None] * 3,
        ),
        (
            {"attention_chunk_size": 16, "model_type": "llama4_text", "no_rope_layers": [1, 0, 0, 1, 1, 1]},
            [16, None, None, 16, 16, 16],
        ),
        ({"attention_chunk_size": 16, "model_type": "other"}, [None] * 6),
    ],
)
def test_how_far_layers_look_back(body: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(6, **body) == expected


def quantised(excluded: tuple[str, ...], **body: Any) -> list[tuple[bool, bool, bool]]:
    found = layers(2, quantisation=Quantisation("FP8", excluded=excluded), **body)
    formats = [layer.formats for layer in found]
    return [(form.mixer is not None, form.feed is not None, form.shared is not None) for form in formats]


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        ((), [(True, True, False), (True, True, True)]),
        (("lm_head",), [(True, True, False), (True, True, True)]),
        (("model.layers.0.self_attn",), [(False, True, False), (True, True, True)]),
        (("model.layers.*.self_attn*",), [(False, True, False), (False, True, True)]),
        (("model.layers.0.mlp.down_proj",), [(True, False, False), (True, True, True)]),
        (("model.layers.*.mlp.shared_experts",), [(True, True, False), (True, True, False)]),
        (("model.layers.1.mlp.experts",), [(True, True, False), (True, False, True)]),
        (("re:.*mlp.*",), [(True, False, False), (True, False, False)]),
        (("model.layers.1.mlp.gate",), [(True, True, False), (True, True, True)]),
    ],
)
def test_which_parts_are_quantised(excluded: tuple[str, ...], expected: list[tuple[bool, bool, bool]]) -> None:
    assert quantised(excluded, first_k_dense_replace=1) == expected


def test_a_layer_without_a_feed_has_none_to_quantise() -> None:
    assert quantised((), hybrid_override_pattern="ME") == [(True, False, False), (False, True, True)]
    assert quantised(("lm_head",), hybrid_override_pattern="ME") == [(True, False, False), (False, True, True)]
