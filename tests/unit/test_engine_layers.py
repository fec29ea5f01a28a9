# SPDX-License-Identifier: Apache-2.0
"""Flags, engine config and overrides over each other, beside Dynamo's own code where that is installed."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, UsageError
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.engine_layers import (
    DYNAMIC_PREFIX,
    FLAG_KEYS,
    EngineLayers,
    MergedConfig,
    merge,
    split_dynamic_flags,
    with_balancer,
)
from dynamo_mpi.layout.finding import Severity


def dynamos(path: str) -> ModuleType:
    """Load one file of dynamo.trtllm by its path: the package itself wants an engine."""
    spec = importlib.util.find_spec("dynamo")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "trtllm" / path
        if file.is_file():
            found = importlib.util.spec_from_file_location(f"dynamo_trtllm_{file.stem}", file)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module
    pytest.skip("ai-dynamo is not installed")


@pytest.fixture(scope="module")
def parse_dynamic_flags() -> Callable[[list[str]], dict[str, Any]]:
    found: Callable[[list[str]], dict[str, Any]] = dynamos("dynamic_flags.py").parse_dynamic_flags
    return found


@pytest.fixture(scope="module")
def deep_update() -> Callable[[dict[str, Any], Mapping[str, Any]], None]:
    found: Callable[[dict[str, Any], Mapping[str, Any]], None] = dynamos("utils/trtllm_utils.py").deep_update
    return found


def keys(
    flags: Mapping[str, Any] | None = None, text: str | None = None, override: str = "", dynamic: tuple[str, ...] = ()
) -> dict[str, Any]:
    merged = merge(EngineLayers(flags or {}, text, "engine.yaml", override, dynamic))
    return dict(merged.config.keys)


# order


def test_each_layer_lies_over_the_one_before() -> None:
    flags = {"max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 1}
    text = "max_batch_size: 2\nmax_num_tokens: 2"
    assert keys(flags) == {"max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 1}
    assert keys(flags, text) == {"max_batch_size": 2, "max_num_tokens": 2, "max_seq_len": 1}
    three = {"max_batch_size": 3, "max_num_tokens": 2, "max_seq_len": 1}
    assert keys(flags, text, '{"max_batch_size": 3}') == three
    assert keys(flags, text, dynamic=("--trtllm.max_batch_size", "3")) == three


def test_gms_is_set_up_in_the_child_alone() -> None:
    flags = {"load_format": "gms", "tensor_parallel_size": 2}
    (finding,) = merge(EngineLayers(flags)).findings
    assert (finding.rule, finding.severity, finding.found) == ("H17", Severity.ERROR, "--load-format gms, 2 ranks")
    (finding,) = merge(EngineLayers({"load_format": "gms"}, "pipeline_parallel_size: 3")).findings
    assert finding.rule == "H17"
    assert not merge(EngineLayers({"load_format": "gms"})).findings
    # the engine's own, which each rank sets up
    assert not merge(EngineLayers({}, "load_format: GMS\ntensor_parallel_size: 2")).findings
    # what Dynamo gives the engine
    assert keys(flags) == {"tensor_parallel_size": 2}
    assert keys({"load_format": "dummy"}) == {"load_format": "dummy"}


def test_overrides_need_no_engine_config() -> None:
    assert keys(override='{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}
    assert merge(EngineLayers()).config == EngineConfig()


def test_only_the_kv_cache_s_section_is_merged_with_the_file() -> None:
    flags = {"kv_cache_config.free_gpu_memory_fraction": 0.5}
    assert keys(flags, "kv_cache_config: {dtype: fp8}") == {
        "kv_cache_config": {"free_gpu_memory_fraction": 0.5, "dtype": "fp8"}
    }
    assert keys(flags, "kv_cache_config: {free_gpu_memory_fraction: 0.7}") == {
        "kv_cache_config": {"free_gpu_memory_fraction": 0.7}
    }
    # nothing else of ours is a section; whatever is, the file replaces
    merged = keys({"moe_config.backend": "CUTLASS"}, "moe_config: {max_num_tokens: 5}")
    assert merged == {"moe_config": {"max_num_tokens": 5}}


def test_overrides_are_merged_at_every_depth() -> None:
    text = "moe_config: {backend: TRTLLM, load_balancer: {num_slots: 4, layer_updates_per_iter: 1}}\ncp_config: {a: 1}"
    override = {"moe_config": {"load_balancer": {"num_slots": 8}}, "cp_config": None}
    expected = {
        "moe_config": {"backend": "TRTLLM", "load_balancer": {"num_slots": 8, "layer_updates_per_iter": 1}},
        "cp_config": None,
    }
    assert keys(text=text, override=json.dumps(override)) == expected
    flags = ("--trtllm.moe_config.load_balancer.num_slots", "8", "--trtllm.cp_config", "null")
    assert keys(text=text, dynamic=flags) == expected


def test_a_list_or_a_number_gives_way_to_a_section_and_back() -> None:
    assert keys(text="build_config: 3", override='{"build_config": {"b": 1}}') == {"build_config": {"b": 1}}
    assert keys(text="build_config: {b: 1}", override='{"build_config": [2]}') == {"build_config": [2]}


NAMES = st.sampled_from(["kv_cache_config", "max_x", "build_config", "quant_config", "a", "b"])
LEAVES = (
    st.none() | st.integers(-9, 9) | st.booleans() | st.sampled_from(["", "fp9"]) | st.lists(st.integers(), max_size=2)
)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6)
# sections that this package types may hold mappings alone
CONFIGS = st.dictionaries(
    st.sampled_from(["build_config", "quant_config", "peft_cache_config", "a"]), TREES, max_size=4
)


@settings(max_examples=100)
@given(CONFIGS, CONFIGS)
def test_overrides_are_laid_over_as_dynamo_does(
    deep_update: Callable[[dict[str, Any], Mapping[str, Any]], None], below: dict[str, Any], above: dict[str, Any]
) -> None:
    expected = copy.deepcopy(below)
    deep_update(expected, above)
    assert keys(text=yaml.safe_dump(below), override=json.dumps(above)) == expected


# H14


def findings(flags: Mapping[str, Any], text: str | None, override: str = "") -> list[str]:
    merged = merge(EngineLayers(flags, text, "engine.yaml", override))
    assert all((finding.rule, finding.severity.value) == ("H14", "warning") for finding in merged.findings)
    return [finding.message.split()[0] for finding in merged.findings]


@pytest.mark.parametrize("path", FLAG_KEYS)
def test_a_flag_that_the_file_contradicts_is_named(path: str) -> None:
    section, _, leaf = path.rpartition(".")
    value, other = (True, False) if leaf == "enable_attention_dp" else (0.5, 0.25) if "fraction" in leaf else (4, 2)
    line = f"{section}: {{{leaf}: %s}}" if section else f"{leaf}: %s"
    contradicting, agreeing = line % str(other).lower(), line % str(value).lower()
    assert findings({path: value}, contradicting) == [FLAG_KEYS[path]]
    assert findings({path: value}, agreeing) == []
    assert findings({path: value}, "backend: pytorch") == []
    assert findings({path: value}, None) == []
    assert findings({path: value}, None, json.dumps({section or leaf: {leaf: other} if section else other})) == []


def test_the_finding_says_both_values_and_where() -> None:
    (finding,) = merge(EngineLayers({"max_batch_size": 4}, "max_batch_size: 8", "/e.yaml")).findings
    assert "--max-batch-size 4 has no effect" in finding.message
    assert "/e.yaml says max_batch_size: 8" in finding.found
    assert "--override-engine-args" in finding.fix


# dynamic flags


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", None),
        ("NULL", None),
        ("8", 8),
        ("-1", -1),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("True", True),
        ("false", False),
        ("yes", "yes"),
        ("fp8", "fp8"),
        ("0x10", "0x10"),
        ("[1]", "[1]"),
        ("", ""),
        (" 7 ", 7),
    ],
)
def test_values_are_typed_as_dynamo_does(
    parse_dynamic_flags: Callable[[list[str]], dict[str, Any]], text: str, value: object
) -> None:
    found = keys(dynamic=("--trtllm.quant_config.x", text))["quant_config"]["x"]
    assert (found, type(found)) == (value, type(value))
    assert parse_dynamic_flags(["--trtllm.quant_config.x", text]) == {"quant_config": {"x": value}}


WORDS = st.sampled_from(
    [
        *("--trtllm.a", "--trtllm.a.b", "--trtllm.a.b.c", "--trtllm.b", "--trtllm.", "--trtllm..a", "--trtllm.a."),
        *("1", "none", "x", "-1", "nan", "--other", "true", "inf"),
    ]
)


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=8))
def test_a_command_line_is_read_or_refused_as_dynamo_does(
    parse_dynamic_flags: Callable[[list[str]], dict[str, Any]], words: list[str]
) -> None:
    try:
        expected = parse_dynamic_flags(list(words))
    except SystemExit:
        expected = None
    try:
        others, dynamic = split_dynamic_flags(words)
        found = None if others else keys(dynamic=tuple(dynamic))
    except UsageError:
        found = None
    # NaN is not equal to itself
    assert repr(found) == repr(expected)


def test_dynamic_flags_are_taken_out_of_a_command_line() -> None:
    words = ["check", "--model", "m", "--trtllm.a.b", "1", "--output", "json", "--trtllm.c", "-1"]
    assert split_dynamic_flags(words) == (
        ["check", "--model", "m", "--output", "json"],
        ["--trtllm.a.b", "1", "--trtllm.c", "-1"],
    )
    assert split_dynamic_flags([]) == ([], [])


@pytest.mark.parametrize("words", [["--trtllm.a"], ["--trtllm.a", "--trtllm.b", "1"], ["x", "--trtllm.a", "--model"]])
def test_a_dynamic_flag_without_a_value_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"--trtllm.a has no value"):
        split_dynamic_flags(words)


@pytest.mark.parametrize(
    "dynamic",
    [
        ("--trtllm.", "1"),
        ("--trtllm.a..b", "1"),
        ("--trtllm.a.", "1"),
        ("--trtllm.a", "1", "--trtllm.a.b", "2"),
        ("--trtllm.a.b", "x", "--trtllm.a.b.c.d", "2"),
    ],
)
def test_flags_that_name_nothing_or_contradict_are_refused(dynamic: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="names no engine key, or contradicts another"):
        keys(dynamic=dynamic)


def test_of_two_dynamic_flags_the_later_one_counts() -> None:
    assert keys(dynamic=("--trtllm.a", "1", "--trtllm.a", "2")) == {"a": 2}
    assert keys(dynamic=("--trtllm.a.b", "1", "--trtllm.a", "2")) == {"a": 2}
    assert keys(dynamic=("--trtllm.a", "none", "--trtllm.a.b", "2")) == {"a": {"b": 2}}


def test_both_kinds_of_overrides_are_refused() -> None:
    with pytest.raises(UsageError, match="given together"):
        keys(override='{"a": 1}', dynamic=("--trtllm.a", "1"))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": 1, "a": 2}', "a: 1"])
def test_an_override_is_a_json_object(text: str) -> None:
    with pytest.raises(ConfigFileError, match="--override-engine-args"):
        keys(override=text)


@pytest.mark.parametrize(
    ("layers", "where"),
    [
        (EngineLayers({"max_batch_size": 0}), "the engine's flags: max_batch_size is 0"),
        (EngineLayers({}, "max_batch_size: x", "/e.yaml"), "/e.yaml, line 1: max_batch_size is 'x'"),
        (EngineLayers(override_text='{"moe_config": 1}'), "the engine's flags: moe_config is 1"),
        (
            EngineLayers({"kv_cache_config.free_gpu_memory_fraction": 0.5}, "kv_cache_config: 3", "/e"),
            "kv_cache_config",
        ),
        (EngineLayers({}, "", "/e.yaml"), "/e.yaml is empty"),
    ],
)
def test_what_cannot_be_typed_is_reported_with_its_place(layers: EngineLayers, where: str) -> None:
    with pytest.raises(ConfigFileError, match=where):
        merge(layers)


def test_one_wrong_type_hides_no_other_mistake() -> None:
    text = "tensor_parallel_size: eight\nmax_batch_sizes: 4\nkv_cache_config:\n  free_gpu_memory_fraction: lots\n"
    with pytest.raises(ConfigFileError) as caught:
        merge(EngineLayers({"max_num_tokens": 0}, text, "/e.yaml"))
    head, *lines = caught.value.problem.splitlines()
    assert head == "/e.yaml has 4 values and keys that can't be used:"
    assert [line.strip().partition(", expected")[0] for line in lines] == [
        "line 1: tensor_parallel_size is 'eight'",
        "max_num_tokens is 0",
        "line 4: kv_cache_config.free_gpu_memory_fraction is 'lots'",
        "`max_batch_sizes` is not a key of TensorRT-LLM's YAML (max_batch_size: 4)",
    ]


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(sorted(FLAG_KEYS)), st.integers(1, 4), max_size=3),
    st.none() | st.dictionaries(st.sampled_from([*FLAG_KEYS, "kv_cache_config", "moe_config"]), TREES, max_size=3),
    st.none() | st.dictionaries(NAMES | st.sampled_from(sorted(FLAG_KEYS)), TREES, max_size=3),
    st.lists(st.sampled_from(["tensor_parallel_size", "kv_cache_config.dtype", "moe_config", "a.b"]), max_size=2),
)
def test_anything_is_merged_or_refused(
    flags: dict[str, Any], text: dict[str, Any] | None, override: dict[str, Any] | None, dynamic: list[str]
) -> None:
    layers = EngineLayers(
        flags,
        None if text is None else yaml.safe_dump(text),
        "e.yaml",
        "" if override is None else json.dumps(override),
        [word for name in dynamic for word in (DYNAMIC_PREFIX + name, "2")],
    )
    try:
        merged = merge(layers)
    except DynamoMpiError as error:
        assert isinstance(error, (ConfigFileError, UsageError))
    else:
        assert merged.config.tp_size >= 1


def test_the_layers_given_are_left_alone() -> None:
    flags = {"kv_cache_config.free_gpu_memory_fraction": 0.5, "max_batch_size": 1}
    before = copy.deepcopy(flags)
    keys(flags, "kv_cache_config: {dtype: fp8}", '{"kv_cache_config": {"dtype": "auto"}}')
    assert flags == before


# the load balancer's file


def balanced() -> MergedConfig:
    text = "moe_config: {backend: CUTLASS, load_balancer: /b.yaml}"
    return merge(EngineLayers({"max_batch_size": 1}, text + "\nmax_batch_size: 2"))


def test_a_balancer_s_file_is_filled_in() -> None:
    merged = balanced()
    assert (merged.config.moe.balancer_path, merged.config.moe.balanced) == ("/b.yaml", True)
    assert merged.config.moe.num_slots is None
    text = "num_slots: 4\nlayer_updates_per_iter: 1\ninitial_global_assignments: {3: [0, 1, 2, 0], 4: [2, 1, 0, 0]}"
    filled = with_balancer(merged, text)
    moe = filled.config.moe
    assert (moe.backend, moe.balancer_path, moe.balanced, moe.num_slots) == ("CUTLASS", "/b.yaml", True, 4)
    assert moe.assignments == ((3, (0, 1, 2, 0)), (4, (2, 1, 0, 0)))
    assert [finding.rule for finding in filled.findings] == ["H14"]
    assert filled.config.keys == merged.config.keys


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "/b.yaml is empty"),
        ("- 1", "/b.yaml holds a list"),
        ("num_slots: many", "/b.yaml: num_slots is 'many'"),
        ("num_slots: 0", "/b.yaml: num_slots is 0"),
        ("num_slots: 4\nnum_slots: 4", "/b.yaml, line 2"),
        ("initial_global_assignments: [1]", "/b.yaml: initial_global_assignments"),
        ("initial_global_assignments: {3: [a]}", r"/b.yaml: initial_global_assignments\.3"),
        ("initial_global_assignments: {3: [-1]}", r"/b.yaml: initial_global_assignments\.3"),
    ],
)
def test_a_balancer_s_file_is_as_strict_as_a_config(text: str, words: str) -> None:
    with pytest.raises(ConfigFileError, match=words):
        with_balancer(balanced(), text)


@pytest.mark.parametrize(
    "key",
    [
        *("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "gpus_per_node"),
        *("moe_tensor_parallel_size", "moe_expert_parallel_size", "moe_cluster_parallel_size"),
    ],
)
def test_sizes_of_no_world_are_refused(key: str) -> None:
    """Rules go through every stage and every divisor: they'd do so for hours, and for more memory than there is."""
    assert keys(text=f"{key}: 65536") == {key: 65536}
    with pytest.raises(ConfigFileError, match=f"{key} is 65537"):
        keys(text=f"{key}: 65537")
