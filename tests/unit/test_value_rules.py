# SPDX-License-Identifier: Apache-2.0
"""The values of the engine YAML: nothing that the engine accepts is refused, and what it refuses is, by version."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_keys import engine_keys
from dynamo_mpi.layout.engine_values import EngineValues, describe, engine_values, parse_spec
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.layout.key_rules import check_keys
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from dynamo_mpi.layout.value_rules import accepted_texts, check_values
from tests.conftest import ROOT

FILE = ROOT / "dynamo_mpi/layout/engine_values.json"
TABLE = engine_values()
NEWEST = str(TABLE.newest)
VERSIONS = ["1.0.0", "1.1.0", "1.2.0", "1.3.0rc22", NEWEST, "1.4.0rc4", None]


def check(text: str, version: str | None) -> list[Finding]:
    config = yaml.safe_load(text)
    return check_values(config, None if version is None else parse_trtllm_version(version))


def refused(text: str, version: str | None) -> Finding:
    (finding,) = check(text, version)
    assert finding.rule == "H"
    return finding


REFUSED: list[tuple[str, str | None, str]] = [
    # the table of cases, C7
    ("allreduce_strategy: MNVL", None, "MNNVL"),
    ("scheduler_config: {capacity_scheduler_policy: MAX_UTIL}", None, "MAX_UTILIZATION"),
    ("load_format: dumy", None, "DUMMY"),
    ("kv_cache_config: {mamba_ssm_cache_dtype: fp16}", "1.2.0", "float16"),
    ("speculative_config: {decoding_type: EAGLE4, max_draft_len: 3}", "1.2.0", "Eagle"),
    ("sparse_attention_config: {algorithm: dsa2}", None, "dsa"),
    ("stream_interval: 0", None, "above 0"),
    ("cache_transceiver_config: {backend: NIXL, kv_transfer_timeout_ms: 0}", "1.2.0", "above 0"),
    ("cache_transceiver_config: {backend: UCX, transceiver_runtime: auto}", "1.2.0", "one of CPP, PYTHON, or null"),
    ("cache_transceiver_config: {backend: MOONCAKE}", "1.1.0", "NIXL"),
    # their siblings
    ("kv_cache_config: {enable_block_reuse: maybe}", None, "true or false"),
    ("kv_cache_config: {host_cache_size: many}", "1.2.0", "whole number"),
    ("kv_cache_config: {kv_events_config: {buffer_steps: 0}}", NEWEST, "above 0"),
    ("cuda_graph_config: {max_batch_size: -1}", "1.2.0", "at least 0"),
    ("nvfp4_gemm_config: {allowed_backends: [marlin]}", "1.2.0", "cutlass"),
    ("nvfp4_gemm_config: {allowed_backends: []}", NEWEST, "isn't empty"),
    ("guided_decoding_backend: outlines", None, "xgrammar"),
    ("kv_cache_config: null", None, "a mapping"),
    ("lora_config: {lora_ckpt_source: s3}", None, "hf"),
    ("gms_config: {mode: rx}", NEWEST, "auto"),
]


@pytest.mark.parametrize(
    ("text", "version", "needed"), REFUSED, ids=[f"{text} {version}" for text, version, _ in REFUSED]
)
def test_refused_values_name_what_is_allowed(text: str, version: str | None, needed: str) -> None:
    finding = refused(text, version)
    assert finding.severity is Severity.ERROR
    assert needed in finding.expected and needed in finding.fix


TAKEN: list[tuple[str, str | None]] = [
    ("cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 0}", "1.2.0"),
    ("cache_transceiver_config: {backend: UCX, transceiver_runtime: auto}", NEWEST),
    ("cache_transceiver_config: {backend: UCX, transceiver_runtime: auto}", None),
    ("cache_transceiver_config: {backend: MOONCAKE}", "1.2.0"),
    ("kv_cache_config: {max_tokens: 0}", None),
    ("moe_config: {max_num_tokens: -1}", "1.2.0"),
    ("load_format: dummy", "1.2.0"),
    ("stream_interval: '8'", None),
    ("max_batch_size: 8.0", None),
    ("enable_attention_dp: 1", None),
    ("enable_chunked_prefill: 'yes'", None),
    ("kv_cache_config: {free_gpu_memory_fraction: '0.8', disk_cache_size: 0}", NEWEST),
    ("nvfp4_gemm_config: {allowed_backends: [marlin]}", NEWEST),
    ("cuda_graph_config: null", None),
    ("lora_config: {anything: 1}", None),
    ("no_such_key: 1", None),
    ("allreduce_strategy: MNVL", "1.0.0rc1"),
    ("{backend: tensorrt, stream_interval: 0}", "1.2.0"),
    ("speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 1}", "1.1.0"),
    ("speculative_config: {decoding_type: Eagle3, max_draft_len: 3, speculative_model: m}", NEWEST),
    ("post_processor_hook: a.b", NEWEST),
]


@pytest.mark.parametrize(("text", "version"), TAKEN, ids=[f"{text} {version}" for text, version in TAKEN])
def test_what_the_engine_takes_is_taken(text: str, version: str | None) -> None:
    assert check(text, version) == []


TOGETHER: list[tuple[str, str, str]] = [
    ("kv_cache_config: {disk_cache_size: 1000}", NEWEST, "disk_cache_path"),
    ("kv_cache_config: {dtype: fp8_ds_mla, enable_kv_pool_rebalance: true}", NEWEST, "can't be combined"),
    ("speculative_config: {max_draft_len: 3}", "1.2.0", "decoding_type"),
    ("sparse_attention_config: {}", "1.2.0", "algorithm"),
    ("kv_connector_config: {connector_module: m, connector_worker_class: w}", "1.2.0", "connector_scheduler_class"),
    ("{encode_only: true, mm_encoder_only: true}", NEWEST, "can't be combined"),
    (
        "speculative_config: {decoding_type: SA, max_draft_len: 3, max_matching_ngram_size: 0}",
        NEWEST,
        "matches nothing",
    ),
    ("{ray_placement_config: {defer_workers_init: true}}", "1.2.0", "ray"),
]


@pytest.mark.parametrize(("text", "version", "message"), TOGETHER, ids=[row[0] for row in TOGETHER])
def test_keys_that_exclude_each_other(text: str, version: str, message: str) -> None:
    finding = refused(text, version)
    assert finding.severity is Severity.ERROR
    assert message in finding.message
    assert finding.found and finding.fix


APART: list[tuple[str, str | None]] = [
    ("kv_cache_config: {disk_cache_size: 1000, disk_cache_path: /d}", NEWEST),
    ("kv_cache_config: {dtype: fp8_ds_mla, enable_kv_pool_rebalance: false}", NEWEST),
    (
        "kv_cache_config: {mamba_state_config: {additional_snapshot_offsets_from_start: []}, use_kv_cache_manager_v2: false}",
        NEWEST,
    ),
    ("kv_connector_config: {connector: lmcache}", NEWEST),
    ("peft_cache_config: {lora_prefetch_dir: /d}", "1.2.0"),
]


@pytest.mark.parametrize(("text", "version"), APART, ids=[row[0] for row in APART])
def test_keys_that_go_together(text: str, version: str | None) -> None:
    assert check(text, version) == []


def test_a_key_conflict_of_some_version_warns_if_it_isnt_known() -> None:
    finding = refused("peft_cache_config: {lora_prefetch_dir: /d}", None)
    assert finding.severity is Severity.WARNING
    assert "from TensorRT-LLM 1.3.0rc22 on" in finding.message


def test_a_key_of_another_variant_is_foreign() -> None:
    finding = refused("speculative_config: {decoding_type: NGram, max_draft_len: 3, eagle3_one_model: true}", "1.2.0")
    assert "doesn't belong to decoding_type: NGram" in finding.message
    assert finding.fix == "remove the line"


def test_a_newer_version_only_warns() -> None:
    assert refused("stream_interval: 0", "2.0.0").severity is Severity.WARNING
    assert f"up to {NEWEST}" in refused("kv_cache_config: {disk_cache_size: 1000}", "2.0.0").message


def test_many_refused_values_are_counted() -> None:
    keys = [key for key, spec in json.loads(FILE.read_text())["values"][""].items() if spec == "bool"]
    findings = check(json.dumps(dict.fromkeys(keys, "maybe")), None)
    assert [finding.message for finding in findings].index(
        f"{len(keys) - 20} more values that the engine refuses"
    ) == 20


def test_a_version_between_two_accepts_what_either_does() -> None:
    names = {
        version: accepted_texts("moe_config.backend", parse_trtllm_version(version)) for version in ("1.1.0", "1.2.0")
    }
    assert "TRITON" in names["1.1.0"] and "AUTO" not in names["1.1.0"]
    assert "AUTO" in names["1.2.0"] and "MARLIN" not in names["1.2.0"]
    assert "CUTEDSL_FC12" in accepted_texts("moe_config.backend", None)


def test_every_spec_and_condition_can_be_read() -> None:
    data = json.loads(FILE.read_text())
    texts = [
        *data["code"].values(),
        *(text for place, group in data["values"].items() if place != "variants" for text in group.values()),
    ]
    specs = [parse_spec(text) for row in texts for text in (row.values() if isinstance(row, dict) else [row]) if text]
    assert all(describe((spec,)) for spec in specs)
    names = {row["name"] for row in data["sources"]}
    assert all(set(row) <= names for row in texts if isinstance(row, dict))
    assert [row.first for row in TABLE.sources] == sorted(row.first for row in TABLE.sources)
    for row in TABLE.conflicts:
        for condition in row.conditions:
            section, _, key = condition.path.rpartition(".")
            assert key in engine_keys().keys_of(section), condition.path
            assert condition.sign in ("", "=", ">", ":")


def test_every_section_of_values_is_a_section_of_keys() -> None:
    assert sorted(section for section in TABLE.sections if section and not engine_keys().keys_of(section)) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_closed_set_is_accepted_in_full(version: str | None) -> None:
    """What one function says, the other takes: a set and its members."""
    known = None if version is None else parse_trtllm_version(version)
    for section in TABLE.sections:
        for key in engine_keys().keys_of(section):
            path = f"{section}.{key}" if section else key
            for text in accepted_texts(path, known):
                config: object = {key: text}
                for part in reversed(section.split(".") if section else []):
                    config = {part: config}
                assert isinstance(config, dict)
                named = [finding for finding in check_values(config, known) if path in finding.message.split("`")]
                assert named == [] or check_keys(config, known), (path, text, named)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=4,
)
known_keys = st.sampled_from(sorted({key for section in TABLE.sections for key in engine_keys().keys_of(section)}))
sections = st.sampled_from(sorted(engine_keys().keys_of("")))


@given(
    st.dictionaries(sections, st.dictionaries(known_keys, json_values, max_size=4) | json_values, max_size=4),
    st.sampled_from(VERSIONS),
)
def test_no_config_breaks_the_check(config: dict[str, object], version: str | None) -> None:
    for finding in check_values(config, None if version is None else parse_trtllm_version(version)):
        assert finding.message.isprintable() and finding.fix


@pytest.mark.parametrize(
    ("text", "taken", "not_taken", "said"),
    [
        (
            "int",
            [1, "1", 1.0, True, " 7 ", "-2", "1.0"],
            [None, "x", 1.5, "1.5", "", [], "1.", float("nan")],
            "a whole number",
        ),
        ("int! >0 ?", [1, None], [True, "1", 1.0, 0], "a whole number above 0, or null"),
        ("float >=0 <=1", [0, 1, "0.5", True], [2, -0.1, "x", None], "a number at least 0 and at most 1"),
        ("bool", [True, 0, 1.0, "yes", "OFF", "t"], [2, "maybe", None, []], "true or false"),
        ("=A|b", ["A", "b"], ["a", None, 1], "one of A, b"),
        ("~A|b ?", ["a", "B", None], ["c"], "one of A, b, or null"),
        ("[int >0]+", [[1], ["2"]], [[], [0], 1, "1"], "a list that isn't empty, each a whole number above 0"),
        ("str+", ["a"], ["", 1], "a text that isn't empty"),
        ("=all / int >0", ["all", 3], ["some", 0], "all, or a whole number above 0"),
        ("map ?", [{}, None], [[], "x"], "a mapping, or null"),
        ("any", [None, 1, []], [], "any value"),
    ],
)
def test_specs(text: str, taken: list[object], not_taken: list[object], said: str) -> None:
    spec = parse_spec(text)
    assert all(spec.accepts(value) for value in taken)
    assert not any(spec.accepts(value) for value in not_taken)
    assert describe((spec,)) == said


def test_a_kind_that_doesnt_exist() -> None:
    with pytest.raises(ValueError, match="no kind"):
        parse_spec("number")


def test_a_partial_source_leaves_the_rest() -> None:
    data = json.loads(FILE.read_text())
    assert data["sources"][-1]["partial"] is True
    assert str(EngineValues(data).newest) == NEWEST
