# SPDX-License-Identifier: Apache-2.0
"""What ranks hold beside the language model, with figures computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.layout.engine_config import type_engine_config
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.memory import estimate, missing_values
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_files import find_draft, find_model
from dynamo_mpi.layout.model_shape import Encoder, ModelShape
from dynamo_mpi.layout.overheads import extra_weights
from tests.unit.model_zoo import parsed, texts

# nvidia/gpt-oss-120b-Eagle3 and its like: one llama layer whose head knows fewer tokens
EAGLE_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "draft_vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def worker(model: ModelShape | str, role: str = "agg", draft: ModelShape | None = None, **keys: Any) -> LayoutSpec:
    shape = parsed(model) if isinstance(model, str) else model
    config = type_engine_config(keys, "engine.yaml")
    return LayoutSpec(shape, config, Cluster(1, config.world_size, "h200"), role, draft=draft)


def eagle(**changes: Any) -> ModelShape:
    return parse_model_shape(json.dumps({**EAGLE_3, **changes}), "draft/config.json")


def test_a_text_model_has_nothing_beside_it() -> None:
    found = extra_weights(worker("Llama-3.1-8B"))
    assert (found.encoders, found.draft, found.adapters, found.uncounted) == (0, 0, 0, ())


def test_a_vision_encoder_is_whole_on_every_rank() -> None:
    # Kimi-K3: 27 layers x (4 x 1024^2 + 2 x 1024 x 4096), patches of 3 x 14 x 14, a projector from 4 x 1024 to 7168
    parameters = 27 * (4 * 1024**2 + 2 * 1024 * 4096) + 3 * 14 * 14 * 1024 + 4096 * 4096 + 4096 * 7168
    found = [estimate(worker("Kimi-K3", tensor_parallel_size=tp)) for tp in (1, 8)]
    for memory in found:
        assert memory is not None
        assert memory.stages[0].encoder_bytes == 2 * parameters


@pytest.mark.parametrize(
    ("section", "parameters", "missing"),
    [
        # Qwen3.5: what its hub page counts as vision is 456 010 480
        (
            {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "temporal_patch_size": 2}
            | {"spatial_merge_size": 2, "out_hidden_size": 4096},
            456_010_480,
            (),
        ),
        ({"depth": 2, "embed_dim": 8, "mlp_ratio": 4, "hidden_size": 99}, 2 * (4 * 64 + 2 * 8 * 32) + 2 * 64, ()),
        ({"depth": 2}, None, ("vision_config.hidden_size", "vision_config.intermediate_size")),
        ({"hidden_size": 8, "intermediate_size": 8}, None, ("vision_config.num_hidden_layers",)),
    ],
)
def test_sizes_of_encoders(section: dict[str, Any], parameters: int | None, missing: tuple[str, ...]) -> None:
    config = {"vision_config": section, "text_config": {"num_hidden_layers": 1}}
    (found,) = parse_model_shape(json.dumps(config), "config.json").encoders
    assert found.missing == missing
    assert found.parameters == (None if parameters is None else pytest.approx(parameters, rel=0.02))


def test_an_encode_worker_holds_encoders_alone() -> None:
    memory = estimate(worker("Kimi-K3", "encode"))
    assert memory is not None
    (stage,) = memory.stages
    assert stage.weights_bytes == stage.encoder_bytes == extra_weights(worker("Kimi-K3")).encoders
    assert (stage.kv_bytes_per_token, memory.tokens, memory.fits) == (0, None, True)


def test_an_encode_worker_of_a_text_model_is_not_estimated() -> None:
    subject = worker("Llama-3.1-8B", "encode")
    assert estimate(subject) is None
    assert missing_values(subject) == ("vision_config or audio_config",)


def test_check_says_what_an_encode_worker_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, code, text in (
        ("Kimi-K3", 0, "weights 0.7 GiB"),
        ("Llama-3.1-8B", 0, "not in config.json, so not checked: vision_config or audio_config"),
    ):
        (tmp_path / "config.json").write_text(texts(model)[0])
        words = ["check", "--model", str(tmp_path), "--role", "encode", "--gpus-per-node", "1", "--gpu", "h200"]
        assert main(words) == code
        assert text in capsys.readouterr().out


def test_an_encoder_of_unknown_size_makes_a_lower_bound() -> None:
    shape = replace(parsed("Kimi-K3"), encoders=(Encoder("audio_config", None, ("audio_config.hidden_size",)),))
    memory = estimate(worker(shape, tensor_parallel_size=8))
    assert memory is not None
    assert memory.at_least == ("audio_config.hidden_size",)
    assert estimate(worker(shape, "encode")) is None


@pytest.mark.parametrize("tp", [1, 4])
def test_an_eagle_3_draft_is_divided_like_its_target(tp: int) -> None:
    speculation = {"decoding_type": "Eagle3", "max_draft_len": 3, "speculative_model": "/draft"}
    found = extra_weights(
        worker("Llama-3.1-8B", draft=eagle(), tensor_parallel_size=tp, speculative_config=speculation)
    )
    hidden, width = 4096, 14336
    # queries, keys and values of embedding and hidden state side by side, output, MLP, embedding and head; and the joined states
    attention = 2 * hidden * (32 + 2 * 8) * 128 + 32 * 128 * hidden
    divided = attention + 3 * hidden * width + (128256 + 32000) * hidden
    assert found.draft == 2 * (divided // tp + 3 * hidden * hidden)
    assert found.uncounted == ()


def test_a_draft_model_s_cache_adds_to_the_last_stage() -> None:
    speculation = {"decoding_type": "DRAFT_TARGET", "max_draft_len": 3, "speculative_model": "/draft"}
    keys: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    plain = estimate(worker("Llama-3.1-70B", **keys))
    memory = estimate(worker("Llama-3.1-70B", draft=parsed("Llama-3.1-8B"), **keys, speculative_config=speculation))
    assert plain is not None
    assert memory is not None
    first, last = memory.stages
    assert (first.draft_bytes, first.kv_bytes_per_token) == (0, plain.stages[0].kv_bytes_per_token)
    assert last.draft_bytes == pytest.approx(8.03e9, rel=0.01)
    assert last.kv_bytes_per_token == plain.stages[1].kv_bytes_per_token + 131072 // 2


@pytest.mark.parametrize(
    ("speculation", "uncounted"),
    [
        ({"decoding_type": "Eagle3", "speculative_model": "/nowhere"}, ("speculative_config.speculative_model",)),
        ({"decoding_type": "Draft_Target"}, ("speculative_config.speculative_model",)),
        ({"decoding_type": "NGram"}, ()),
        ({"decoding_type": "MTP", "max_draft_len": 1}, ()),
    ],
)
def test_a_draft_that_is_not_here_is_named(speculation: dict[str, Any], uncounted: tuple[str, ...]) -> None:
    memory = estimate(worker("Llama-3.1-8B", speculative_config=speculation))
    assert memory is not None
    assert memory.at_least == uncounted


def test_the_draft_model_is_read_where_the_engine_config_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EAGLE_3))
    config = type_engine_config(
        {"speculative_config": {"decoding_type": "Eagle3", "speculative_model": str(tmp_path)}}, "x"
    )
    found = find_draft(config, "/target/config.json")
    assert found is not None
    assert (found.num_layers, found.draft_vocab_size) == (1, 32000)
    assert find_draft(config, str(tmp_path / "config.json")) is None
    assert find_draft(type_engine_config({}, "x"), "") is None


LORA = {"max_lora_rank": 16, "max_loras": 4, "lora_target_modules": ["attn_q", "attn_k", "attn_v"]}


@pytest.mark.parametrize(
    ("keys", "adapters", "uncounted"),
    [
        # rank x layers x modules x adapters sets of the largest module at rank 1: its 4096 inputs and 4096 outputs
        ({"lora_config": LORA}, 16 * 32 * 3 * 4 * (4096 + 4096) * 2, ()),
        ({"lora_config": LORA, "tensor_parallel_size": 4}, 16 * 32 * 3 * 4 * (4096 + 1024) * 2, ()),
        # the engine adds what is missing of queries, keys and values
        ({"lora_config": {**LORA, "lora_target_modules": ["q_proj"]}}, 16 * 32 * 3 * 4 * 8192 * 2, ()),
        ({"lora_config": {**LORA, "lora_target_modules": ["mlp_4h_to_h"]}}, 16 * 32 * 4 * (4096 + 14336) * 2, ()),
        # the default rank is 64
        ({"lora_config": {k: LORA[k] for k in LORA if k != "max_lora_rank"}}, 64 * 32 * 3 * 4 * 8192 * 2, ()),
        (
            {"lora_config": {"lora_target_modules": ["attn_q"]}, "peft_cache_config": {"num_device_module_layer": 7}},
            7 * 8192 * 2,
            (),
        ),
        ({"lora_config": {"lora_target_modules": ["attn_q"]}}, 0, ("lora_config.max_loras",)),
        ({"lora_config": {"max_loras": 4}}, 0, ("lora_config.lora_target_modules",)),
        ({"enable_lora": True}, 0, ("lora_config.lora_target_modules",)),
        (
            {"lora_config": {**LORA, "lora_target_modules": ["moe_router"]}},
            0,
            ("lora_config.lora_target_modules (moe_router)",),
        ),
        (
            {"lora_config": {**LORA, "max_loras": "four", "lora_target_modules": 3}},
            0,
            ("lora_config.lora_target_modules",),
        ),
    ],
)
def test_adapters_take_their_device_cache(keys: dict[str, Any], adapters: int, uncounted: tuple[str, ...]) -> None:
    found = extra_weights(worker("Llama-3.1-8B", **keys))
    assert (found.adapters, found.uncounted) == (adapters, uncounted)


def test_a_diffusers_pipeline_is_named_with_what_it_weighs(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "a.safetensors").write_bytes(b"x" * 2**20)
    with pytest.raises(ModelNotFoundError, match=r"diffusers pipeline \(model_index.json\)") as raised:
        find_model(str(tmp_path))
    assert "transformer 0.0 GiB" in str(raised.value.fix)


def test_a_key_that_is_not_known_makes_a_lower_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(texts("Llama-3.1-8B")[0])
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_oracles": 7, "oracle_scale": 0.5}))
    words = ["check", "--model", str(tmp_path), "--gpus-per-node", "1", "--gpu", "h200"]
    assert main([*words, "--output", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unknown"] == ["num_oracles", "oracle_scale"]
    assert report["memory"]["at_least"] == ["num_oracles"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "keys of config.json that aren't known here, so not considered: num_oracles, oracle_scale" in text
    assert "weights at least 15.0 GiB" in text
    assert "not counted: num_oracles" in text
