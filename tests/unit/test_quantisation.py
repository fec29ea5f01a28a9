# SPDX-License-Identifier: Apache-2.0
"""How checkpoints say that they are quantised, and which modules they leave out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.config_reader import ConfigReader
from dynamo_mpi.common.errors import ConfigFileError
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import Layer
from dynamo_mpi.layout.quantisation import Quantisation, WeightFormat
from dynamo_mpi.layout.quantisation_config import read_quantisation, with_formats
from tests.unit.model_zoo import QUANT_FILES, ZOO


def read(config: dict[str, Any], quant_file: dict[str, Any] | None = None) -> Quantisation | None:
    return read_quantisation(
        ConfigReader(config, "config.json"),
        None if quant_file is None else ConfigReader(quant_file, "hf_quant_config.json"),
    )


def hugging_face(**section: Any) -> Quantisation | None:
    return read({"quantization_config": section})


def modelopt(**section: Any) -> Quantisation | None:
    return read({}, {"quantization": section})


def excluding(*names: str) -> Quantisation:
    return Quantisation("FP8", excluded=names)


def group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@pytest.mark.parametrize(
    ("section", "algo", "size", "certain"),
    [
        ({"quant_method": "fp8"}, "FP8", None, True),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8_BLOCK_SCALES", 128, True),
        ({"quant_method": "fp8", "weight_block_size": []}, "FP8", None, True),
        ({"quant_method": "fbgemm_fp8"}, "FP8_ROWWISE", None, True),
        ({"quant_method": "mxfp4"}, "MXFP4", None, True),
        ({"quant_method": "awq", "group_size": 64}, "W4A16_AWQ", 64, True),
        ({"quant_method": "awq"}, "W4A16_AWQ", None, True),
        ({"quant_method": "gptq", "group_size": -1}, "W4A16_GPTQ", None, True),
        ({"quant_method": "gptq", "group_size": 32}, "W4A16_GPTQ", 32, True),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes", None, False),
        ({"quant_method": "modelopt", "quant_algo": "nvfp4", "group_size": 16}, "NVFP4", 16, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "FP8_BLOCK_SCALES", None, True),
        ({"quant_method": "modelopt", "quant_algo": "mixed_precision"}, "MIXED_PRECISION", None, False),
        # compressed-tensors
        ({"config_groups": group(num_bits=8, type="float", strategy="tensor")}, "FP8", None, True),
        ({"config_groups": group(num_bits=8, type="float", strategy="channel")}, "FP8_ROWWISE", None, True),
        ({"config_groups": group(num_bits=8, type="float", strategy="block")}, "FP8_BLOCK_SCALES", 128, True),
        ({"config_groups": group(num_bits=4, type="float", group_size=16)}, "NVFP4", 16, True),
        ({"config_groups": group(num_bits=4, type="float", group_size=32)}, "MXFP4", 32, True),
        ({"config_groups": group(num_bits=4, type="int", group_size=32)}, "W4A16_AWQ", 32, True),
        ({"config_groups": group(num_bits=4, type="int", group_size=True)}, "W4A16_AWQ", None, True),
        ({"config_groups": group(num_bits=8, type="int")}, "INT8", None, True),
        ({"config_groups": {}}, "compressed-tensors", None, False),
        ({"config_groups": {"group_0": 3}}, "compressed-tensors", None, False),
        (
            {"config_groups": {**group(num_bits=8, type="float"), "b": {"weights": {}}}},
            "compressed-tensors",
            None,
            False,
        ),
        (
            {"config_groups": {"a": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "type": "float"}}}},
            "FP8",
            None,
            True,
        ),
    ],
)
def test_formats(section: dict[str, Any], algo: str, size: int | None, certain: bool) -> None:
    found = hugging_face(**{"quant_method": "compressed-tensors", **section})
    assert found is not None
    assert (found.algo, found.group_size, found.certain, found.source) == (algo, size, certain, "quantization_config")


def test_a_checkpoint_that_says_nothing_is_not_quantised() -> None:
    assert read({}) is None
    assert read({"quantization_config": None}) is None
    assert hugging_face() is None
    assert read({}, {}) is None
    assert modelopt(quant_algo=None, kv_cache_quant_algo=None) is None


def test_the_language_model_s_part_counts_too() -> None:
    for key in ("text_config", "llm_config"):
        found = read({key: {"quantization_config": {"quant_method": "fp8"}}})
        assert found is not None and found.algo == "FP8"


def test_modelopt_s_own_file_comes_first() -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    file = {
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"],
        }
    }
    found = read(config, file)
    assert found == Quantisation(
        "NVFP4", 16, "FP8", ("lm_head", "model.layers.*.mlp.gate"), True, "hf_quant_config.json"
    )
    # a file without the section says nothing
    assert read(config, {"producer": {}}) == read(config)


def test_a_calibrated_cache_alone_quantises_no_weights() -> None:
    found = modelopt(kv_cache_quant_algo="FP8")
    assert found is not None
    assert (found.algo, found.kv_algo, found.certain, found.format.known) == ("NONE", "FP8", False, False)


@pytest.mark.parametrize(
    ("scheme", "kv_algo"),
    [(None, None), ("FP8", "FP8"), ({"num_bits": 8, "type": "float"}, "FP8"), ("nvfp4", "nvfp4")],
)
def test_the_kv_cache_s_scheme(scheme: Any, kv_algo: str | None) -> None:
    found = hugging_face(quant_method="fp8", kv_cache_scheme=scheme)
    assert found is not None and found.kv_algo == kv_algo


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers"])
def test_every_name_of_the_exclusions(key: str) -> None:
    found = hugging_face(quant_method="fp8", **{key: ["lm_head"]})
    assert found is not None and found.excluded == ("lm_head",)
    for bad in ("lm_head", [1], {"a": 1}):
        with pytest.raises(ConfigFileError, match=f"quantization_config.{key}"):
            hugging_face(quant_method="fp8", **{key: bad})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": 3}, "quantization_config is 3"),
        ({"quantization_config": {"quant_method": 3}}, r"quantization_config\.quant_method is 3"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "x"}}, r"weight_block_size is 'x'"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 0}}, r"group_size is 0"),
    ],
)
def test_values_of_the_wrong_type_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigFileError, match=words):
        read(config)


@pytest.mark.parametrize(
    ("algo", "size", "each", "block"),
    [
        ("FP8", None, 1.0, 1),
        ("FP8_BLOCK_SCALES", 128, 1 + 4 / 128**2, 128),
        ("NVFP4", None, 0.5625, 16),
        ("MXFP4", None, 0.53125, 32),
        ("W4A16_AWQ", 128, 0.5 + 2 / 128, 128),
        ("W4A16_AWQ", 32, 0.5 + 2 / 32, 32),
        ("W4A16_GPTQ", None, 0.5 + 2 / 128, 128),
    ],
)
def test_what_an_element_weighs(algo: str, size: int | None, each: float, block: int) -> None:
    found = WeightFormat(algo, size)
    assert (found.known, found.bytes_per_element, found.block) == (True, each, block)


def test_unknown_formats() -> None:
    found = WeightFormat("W3A5")
    assert (found.known, found.block) == (False, 1)
    with pytest.raises(KeyError):
        _ = found.bytes_per_element


O_PROJ = "layers.3.self_attn.o_proj"


@pytest.mark.parametrize(
    ("pattern", "out", "kept"),
    [
        # whole names, above or at the module
        ("lm_head", ["lm_head"], [O_PROJ, "layers.0.mlp.lm_head_of_sorts"]),
        ("model.layers.3.self_attn.o_proj", [O_PROJ], ["layers.3.self_attn.q_proj", "layers.33.self_attn.o_proj"]),
        ("model.layers.3", [O_PROJ, "layers.3.mlp.down_proj"], ["layers.30.mlp.down_proj", "layers.2.mlp.down_proj"]),
        ("model.layers.3.mlp", ["layers.3.mlp.down_proj"], ["layers.3.mlp2.down_proj", O_PROJ]),
        ("model.layers.3.mlp.gate", ["layers.3.mlp.gate"], ["layers.3.mlp.gate_proj"]),
        ("language_model.model.layers.3.self_attn", [O_PROJ], ["layers.4.self_attn.o_proj"]),
        ("model.language_model.layers.3.self_attn", [O_PROJ], ["layers.4.self_attn.o_proj"]),
        # parts of names, wherever they stand
        ("self_attn", [O_PROJ], ["layers.3.mlp.down_proj", "layers.3.self_attn_norm.weight"]),
        ("mlp.gate", ["layers.3.mlp.gate"], ["layers.3.mlp.gate_proj"]),
        # with stars
        ("model.layers.*.self_attn", [O_PROJ, "layers.12.self_attn.q_proj"], ["layers.3.mlp.down_proj"]),
        ("model.layers.*.mlp.shared_expert", ["layers.1.mlp.shared_expert.down_proj"], ["layers.1.mlp.experts.0.w"]),
        ("*self_attn*", [O_PROJ], ["layers.3.mlp.down_proj"]),
        ("*.mlp.gate", ["layers.3.mlp.gate"], ["layers.3.mlp.gate_proj"]),
        ("*lm_head*", ["lm_head"], [O_PROJ]),
        ("model.layers.?.self_attn*", [O_PROJ], ["layers.13.self_attn.o_proj"]),
        ("model.layers.3?.self_attn*", ["layers.31.self_attn.o_proj"], [O_PROJ, "layers.13.self_attn.o_proj"]),
        ("model.layers.3*", [O_PROJ, "layers.31.mlp.down_proj"], ["layers.13.self_attn.o_proj"]),
        ("model.layers.3.*", [O_PROJ, "layers.3"], ["layers.31.self_attn.o_proj"]),
        ("model.layers.3.mlp*", ["layers.3.mlp.down_proj", "layers.3.mlp_norm"], [O_PROJ, "layers.31.mlp.down_proj"]),
        # regular expressions
        ("re:.*self_attn.*", [O_PROJ], ["layers.3.mlp.down_proj"]),
        ("re:.*lm_head", ["lm_head"], [O_PROJ]),
        (r"re:^model\.layers\.3\..*", [O_PROJ], ["layers.4.self_attn.o_proj"]),
        ("re:model.layers.3.self_attn", [O_PROJ], ["layers.4.self_attn.o_proj"]),
        (r"re:language_model\.model\.layers\.3\..*", [O_PROJ], ["layers.4.self_attn.o_proj"]),
        (r"re:.*\.mlp\.gate$", ["layers.3.mlp.gate"], ["layers.3.mlp.gate_proj"]),
        ("re:(", [], [O_PROJ, "lm_head"]),
        ("re:a{99999999999999999999}", [], [O_PROJ, "lm_head"]),
        (f"re:{'(' * 5000}", [], [O_PROJ, "lm_head"]),
        # other parts of the model count their layers too
        ("model.vision_model.layers.3.self_attn", [], [O_PROJ]),
        ("vision_tower.encoder.layers.3.self_attn", [], [O_PROJ]),
        ("model.visual.layers.*.self_attn", [], [O_PROJ]),
        ("vision_tower.*", [], [O_PROJ]),
        ("re:.*vision_tower.*", [], [O_PROJ]),
        ("multi_modal_projector", [], [O_PROJ]),
        ("mtp.layers.3.self_attn", [], [O_PROJ]),
    ],
)
def test_exclusions(pattern: str, out: list[str], kept: list[str]) -> None:
    found = excluding(pattern)
    assert [module for module in [*out, *kept] if found.excludes(module)] == out
    # beside others it does the same
    assert all(excluding("embed_tokens", pattern).excludes(module) for module in out)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(st.lists(st.text(alphabet="ab.*?[](){}|^$\\+:0rex lyers", max_size=16), max_size=4))
def test_any_pattern_is_matched_or_passed_over(patterns: list[str]) -> None:
    assert excluding(*patterns).excludes(O_PROJ) in (True, False)
    assert excluding(*(f"re:{pattern}" for pattern in patterns)).excludes(O_PROJ) in (True, False)


@pytest.mark.parametrize(
    ("model", "algo", "attention", "feed", "shared"),
    [
        ("DeepSeek-R1", "FP8_BLOCK_SCALES", True, True, True),
        ("Qwen3-32B-FP8", "FP8_BLOCK_SCALES", True, True, False),
        ("Qwen3-235B-A22B-FP8", "FP8_BLOCK_SCALES", True, True, True),
        ("gpt-oss-120b", "MXFP4", False, True, True),
        ("Kimi-K2.5", "W4A16_AWQ", False, True, False),
        ("Nemotron-3-Super-120B-A12B-FP8", "FP8", True, True, True),
        ("Llama-3.1-8B", None, False, False, False),
    ],
)
def test_public_checkpoints(model: str, algo: str | None, attention: bool, feed: bool, shared: bool) -> None:
    quant_file = json.dumps(QUANT_FILES[model]) if model in QUANT_FILES else None
    shape = parse_model_shape(json.dumps(ZOO[model]), "config.json", quant_file)
    assert (shape.quantisation.algo if shape.quantisation is not None else None) == algo
    layers = shape.layers or ()
    found = [any(getattr(layer.formats, part) for layer in layers) for part in ("mixer", "feed", "shared")]
    assert found == [attention, feed, shared]


NAMES = st.lists(
    st.sampled_from(["model.", "layers.", "3", "1", ".", "self_attn", "o_proj", "*", "?", "mlp"]), max_size=7
)


@given(st.lists(NAMES.map("".join), max_size=4))
def test_layers_with_equal_keys_are_excluded_alike(patterns: list[str]) -> None:
    found = excluding(*patterns)
    for left, right in ((3, 13), (3, 31), (1, 11), (0, 2)):
        if found.key_of(left) == found.key_of(right):
            for path in ("self_attn.o_proj", "mlp.up"):
                assert found.excludes(f"layers.{left}.{path}") == found.excludes(f"layers.{right}.{path}")


FORMS = {"NVFP4": WeightFormat("NVFP4"), "FP8": WeightFormat("FP8")}
PATTERNS = st.tuples(
    st.sampled_from(["", "re:", "re:.*"]),
    st.sampled_from(["layers.*", "layers.?", r"layers\.\d\d", "layers.1", "layers.[0-9]", r"layers\.(?:3|31)", ""]),
    st.sampled_from([".mlp.down_proj", r"\.mlp\..*", ".mlp*", ".*", "mlp.*", ""]),
)


@given(st.lists(st.tuples(PATTERNS.map("".join), st.sampled_from([*FORMS.values()])), max_size=4))
def test_layers_with_equal_keys_have_equal_formats(modules: list[tuple[str, WeightFormat]]) -> None:
    found = Quantisation("MIXED_PRECISION", modules=tuple(modules))
    for left, right in ((3, 13), (3, 31), (1, 11), (1, 2), (13, 31)):
        if found.key_of(left) == found.key_of(right):
            forms = [found.format_of([f"layers.{number}.mlp.down_proj"]) for number in (left, right)]
            assert forms[0] == forms[1]


@pytest.mark.parametrize(
    ("modules", "kinds"),
    [
        ({"model.layers.?.mlp.down_proj": "NVFP4"}, "NNNNNNNNNN--"),
        ({r"re:.*layers\.\d\.mlp\.down_proj": "NVFP4"}, "NNNNNNNNNN--"),
        ({r"re:.*layers\.\d\d\..*": "NVFP4"}, "----------NN"),
        (
            {"model.layers.1.mlp*": "NVFP4", "model.layers.*.mlp*": "FP8", "model.layers.2.mlp*": "NVFP4"},
            "FNFFFFFFFFFF",
        ),
        ({"model.layers.*.mlp*": "NVFP4"}, "NNNNNNNNNNNN"),
    ],
)
def test_each_layer_has_the_format_of_its_pattern(modules: dict[str, str], kinds: str) -> None:
    found = Quantisation("MIXED_PRECISION", modules=tuple((name, FORMS[form]) for name, form in modules.items()))
    feeds = [layer.formats.feed for layer in with_formats((Layer(),) * 12, found)]
    assert feeds == [found.format_of([f"layers.{number}.mlp.down_proj"]) for number in range(12)]
    assert "".join("-" if form is None else form.algo[0] for form in feeds) == kinds
