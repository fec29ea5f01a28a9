# SPDX-License-Identifier: Apache-2.0
"""A model's shape, from its config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import Layer, ModelShape
from tests.unit.model_zoo import ZOO
from tests.unit.models import DEEPSEEK, LLAMA_4, PHI_4, SMOLLM2


def parse(config: object) -> ModelShape:
    return parse_model_shape(json.dumps(config), "/m/config.json")


@pytest.mark.parametrize(
    ("config", "name", "heads", "kv_heads", "latent"),
    [
        (SMOLLM2, "LlamaForCausalLM", 9, 3, False),
        (PHI_4, "Phi3ForCausalLM", 40, 10, False),
        (LLAMA_4, "Llama4ForConditionalGeneration", 40, 8, False),
        (DEEPSEEK, "DeepseekV3ForCausalLM", 128, None, True),
    ],
)
def test_known_models(config: dict[str, Any], name: str, heads: int, kv_heads: int | None, latent: bool) -> None:
    shape = parse(config)
    assert (shape.name, shape.attention_heads, shape.kv_heads, shape.latent is not None) == (
        name,
        heads,
        kv_heads,
        latent,
    )


def test_all_of_a_flat_config_is_read() -> None:
    assert parse(SMOLLM2) == ModelShape(
        name="LlamaForCausalLM",
        attention_heads=9,
        kv_heads=3,
        head_dim=64,
        num_layers=30,
        layers=(Layer(),) * 30,
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
        context_length=8192,
        bos_token_id=1,
    )


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_the_language_model_inside_a_multimodal_one_counts(key: str) -> None:
    shape = parse({"architectures": ["Outer"], "num_attention_heads": 16, key: SMOLLM2})
    assert (shape.name, shape.attention_heads, shape.num_layers, shape.bos_token_id) == ("Outer", 9, 30, 1)


def test_the_outer_bos_token_wins() -> None:
    assert parse({"bos_token_id": 5, "text_config": SMOLLM2}).bos_token_id == 5


def test_without_kv_heads_every_head_has_its_own() -> None:
    assert parse({"num_attention_heads": 12}).kv_heads == 12


def test_value_heads_and_windowed_kv_heads_are_read() -> None:
    shape = parse(ZOO["MiMo-V2-Flash"])
    assert (shape.head_dim, shape.value_head_dim, shape.value_size) == (192, 128, 128)
    assert {(layer.window, layer.sizes.kv_heads) for layer in shape.layers or ()} == {(None, None), (128, 8)}
    plain, latent = parse(SMOLLM2), parse(ZOO["DeepSeek-R1"])
    assert (plain.value_head_dim, plain.value_size) == (None, 64)
    assert (latent.value_head_dim, latent.value_size) == (None, 128)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma3", "tie_word_embeddings": False, "text_config": {"model_type": "gemma3_text"}}, False),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
    ],
)
def test_gemma_ties_its_embeddings_unless_it_says_otherwise(config: dict[str, Any], tied: bool | None) -> None:
    assert parse(config).tied_embeddings is tied


def test_layers_of_a_kind_are_counted_once() -> None:
    kinds, order = parse(ZOO["MiMo-V2-Flash"]).kinds
    assert len(kinds) == 3  # dense, experts without a window, experts with one
    assert order[:6] == (0, 1, 1, 1, 1, 2)
    assert parse({}).kinds == ((), ())


def test_an_empty_config_says_nothing() -> None:
    missing = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
    assert parse({}) == ModelShape("unknown", missing=missing)


@pytest.mark.parametrize(("config", "name"), [({"model_type": "llama"}, "llama"), ({"architectures": []}, "unknown")])
def test_a_model_without_an_architecture_has_a_name(config: dict[str, Any], name: str) -> None:
    assert parse(config).name == name


@pytest.mark.parametrize("value", [0, -1, 9.0, "9", True, [9], {}])
@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size"])
def test_a_size_is_a_positive_whole_number(key: str, value: object) -> None:
    with pytest.raises(ConfigFileError, match=f"/m/config.json: {key} is "):
        parse({**SMOLLM2, key: value})


@pytest.mark.parametrize("value", [None, True, -1, "1", [1, 2], 1.5])
def test_what_is_no_bos_token_is_left_out(value: object) -> None:
    assert parse({"bos_token_id": value}).bos_token_id is None


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", "[" * 100_000, "{} x"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigFileError, match=r"/m/config\.json is not JSON"):
        parse_model_shape(text, "/m/config.json")


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"'])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigFileError, match="not an object"):
        parse_model_shape(text, "/m/config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*SMOLLM2, "text_config", "kv_lora_rank"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_read_or_refused(config: object) -> None:
    try:
        shape = parse(config)
    except ConfigFileError as error:
        assert "/m/config.json" in error.problem
    else:
        assert shape.attention_heads is None or shape.attention_heads > 0
