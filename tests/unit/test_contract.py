# SPDX-License-Identifier: Apache-2.0
"""What each side of a pair says of itself, and how two of them are compared."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.contract import Contract, check_contracts, contract_of
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.finding import Severity
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.unit.model_zoo import QUANT_FILES, ZOO

LLAMA = "Llama-3.1-8B"


def contract(
    model: str | dict[str, Any], engine: str = "{}", role: str = "prefill", version: str | None = None
) -> Contract:
    config = merge(EngineLayers(yaml_text=engine)).config
    quant_file = json.dumps(QUANT_FILES[model]) if isinstance(model, str) and model in QUANT_FILES else None
    shape = parse_model_shape(json.dumps(ZOO[model] if isinstance(model, str) else model), "config.json", quant_file)
    release = None if version is None else parse_trtllm_version(version)
    return contract_of(LayoutSpec(shape, config, Cluster(1, config.world_size), role, release))


def finding_ids(prefill: Contract, decode: Contract) -> list[str]:
    return [f"{finding.severity.value} {finding.rule}" for finding in check_contracts(prefill, decode)]


def test_all_of_a_model_with_heads_is_said() -> None:
    engine = """
        {tensor_parallel_size: 4, pipeline_parallel_size: 2, enable_attention_dp: true, max_seq_len: 4096,
         cache_transceiver_config: {backend: ucx, max_tokens_in_buffer: 8192}, kv_cache_config: {tokens_per_block: 64}}
    """
    assert contract(LLAMA, engine, "decode", "1.3.0rc20") == Contract(
        role="decode",
        model="LlamaForCausalLM",
        num_layers=32,
        kv_heads=8,
        head_dim=128,
        latent_attention=False,
        index_head_dim=0,
        state_heads=0,
        state_dtype=None,
        kv_dtype="bfloat16",
        tokens_per_block=64,
        backend="UCX",
        runtime="AUTO",
        tp_size=4,
        pp_size=2,
        cp_size=1,
        enable_attention_dp=True,
        max_seq_len=4096,
        max_tokens_in_buffer=8192,
        trtllm_version="1.3.0rc20",
    )


def test_a_latent_is_as_large_as_it_is_cached() -> None:
    found = contract("DeepSeek-V3.2")
    assert (found.kv_heads, found.head_dim, found.latent_attention, found.index_head_dim) == (None, 576, True, 128)
    assert contract("DeepSeek-R1").index_head_dim == 0


def test_a_hybrid_s_state_is_said() -> None:
    found = contract("Qwen3-Next-80B-A3B")
    assert (found.kv_heads, found.head_dim, found.state_heads, found.state_dtype) == (2, 256, 32, None)
    said = "kv_cache_config: {mamba_ssm_cache_dtype: bfloat16}"
    assert contract("Qwen3-Next-80B-A3B", said).state_dtype == "bfloat16"
    # what a model without a state gets of it is nothing
    assert contract(LLAMA, said).state_dtype is None


def test_what_is_not_set_is_the_engine_s_default() -> None:
    found = contract(LLAMA)
    assert (found.tokens_per_block, found.backend, found.runtime) == (32, None, "AUTO")
    # the model's own is a matter of each engine's memory
    assert (found.max_seq_len, found.max_tokens_in_buffer, found.trtllm_version) == (None, None, None)


@pytest.mark.parametrize(
    ("model", "dtype", "expected"),
    [
        (LLAMA, "auto", "bfloat16"),
        (LLAMA, "fp8", "fp8"),
        (LLAMA, "FP8", "fp8"),
        (LLAMA, "half", "float16"),
        (LLAMA, "bfloat16", "bfloat16"),
        (LLAMA, "float", "float32"),
        (ZOO[LLAMA] | {"torch_dtype": "float16"}, "auto", "float16"),
        # a calibrated checkpoint, and one whose weights alone are quantised
        ("Nemotron-3-Super-120B-A12B-FP8", "auto", "fp8"),
        ("Nemotron-3-Super-120B-A12B-FP8", "bfloat16", "bfloat16"),
        ("Qwen3-32B-FP8", "auto", "bfloat16"),
        ({"num_attention_heads": 8}, "auto", None),
    ],
)
def test_the_cache_s_type_is_resolved(model: str | dict[str, Any], dtype: str, expected: str | None) -> None:
    assert contract(model, f"kv_cache_config: {{dtype: {dtype}}}").kv_dtype == expected


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [
        ("attn_backend: TRTLLM", 32),
        ("attn_backend: FLASHMLA", 64),
        ("{attn_backend: FlashMLA, kv_cache_config: {tokens_per_block: 32}}", 64),
        ("{attn_backend: VANILLA, max_num_tokens: 2048}", 2048),
        ("{attn_backend: VANILLA, kv_cache_config: {tokens_per_block: 16}}", 16),
        ("kv_cache_config: {tokens_per_block: 128}", 128),
    ],
)
def test_attention_backends_have_blocks_of_their_own(engine: str, tokens: int) -> None:
    assert contract(LLAMA, engine).tokens_per_block == tokens


BASE = contract(
    LLAMA,
    "{max_seq_len: 4096, cache_transceiver_config: {backend: UCX, transceiver_runtime: CPP}}",
    version="1.3.0rc20",
)


def side(field: str, value: Any) -> Contract:
    return replace(BASE, **{field: value})


OTHER: dict[str, tuple[Any, str]] = {
    "model": ("OtherForCausalLM", "I1"),
    "num_layers": (33, "I1"),
    "kv_heads": (4, "I1"),
    "head_dim": (64, "I1"),
    "latent_attention": (True, "I1"),
    "kv_dtype": ("fp8", "I1"),
    "tokens_per_block": (64, "I1"),
    "backend": ("NIXL", "I6"),
    "runtime": ("PYTHON", "I7"),
}
# each side may have its own (I2)
FREE: dict[str, Any] = {
    "role": "decode",
    "tp_size": 8,
    "pp_size": 4,
    "cp_size": 2,
    "enable_attention_dp": True,
    "max_tokens_in_buffer": 4096,
}


@pytest.mark.parametrize("field", OTHER)
def test_what_must_be_the_same(field: str) -> None:
    value, rule = OTHER[field]
    other = side(field, value)
    for prefill, decode in ((BASE, other), (other, BASE)):
        (finding,) = check_contracts(prefill, decode)
        assert (finding.rule, finding.severity) == (rule, Severity.ERROR)
        assert finding.found == f"prefill {getattr(prefill, field)}, decode {getattr(decode, field)}"
        assert finding.expected and finding.fix


@pytest.mark.parametrize("field", FREE)
def test_what_may_differ(field: str) -> None:
    assert finding_ids(BASE, side(field, FREE[field])) == []
    assert finding_ids(side(field, FREE[field]), BASE) == []


@pytest.mark.parametrize(
    ("field", "rule", "values"),
    [
        ("index_head_dim", "I3", (128, 64)),
        ("index_head_dim", "I3", (128, 0)),
        ("state_heads", "I5", (16, 32)),
        ("state_heads", "I5", (0, 32)),
        ("state_dtype", "I5", ("float32", "bfloat16")),
    ],
)
def test_other_caches_must_be_the_same_too(field: str, rule: str, values: tuple[object, object]) -> None:
    sides = [side(field, value) for value in values]
    assert finding_ids(*sides) == finding_ids(*reversed(sides)) == [f"error {rule}"]
    assert finding_ids(sides[0], sides[0]) == []


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("backend", ("DEFAULT", "NIXL"), ["warning I6"]),
        ("backend", ("DEFAULT", "DEFAULT"), []),
        ("backend", ("DEFAULT", "UCX"), ["error I6"]),
        ("backend", ("DEFAULT", "MPI"), ["error I6"]),
        ("backend", ("NIXL", "UCX"), ["error I6"]),
        ("runtime", ("AUTO", "CPP"), ["warning I7"]),
        ("runtime", ("AUTO", "PYTHON"), ["warning I7"]),
        ("runtime", ("AUTO", "AUTO"), []),
        ("runtime", ("CPP", "PYTHON"), ["error I7"]),
        # the engine's own type of states isn't known here
        ("state_dtype", (None, "bfloat16"), []),
    ],
)
def test_what_an_engine_chooses_itself_only_warns(field: str, values: tuple[Any, Any], expected: list[str]) -> None:
    for one, other in (values, values[::-1]):
        found = check_contracts(side(field, one), side(field, other))
        assert [f"{finding.severity.value} {finding.rule}" for finding in found] == expected
        assert all(finding.found == f"prefill {one}, decode {other}" and finding.fix for finding in found)


@pytest.mark.parametrize("field", [name for name in OTHER if name not in ("model", "latent_attention", "runtime")])
def test_what_one_side_does_not_know_is_not_compared(field: str) -> None:
    if field == "tokens_per_block":
        return
    assert finding_ids(BASE, side(field, None)) == []


def test_every_field_is_compared_free_or_looked_at() -> None:
    others = {"index_head_dim", "state_heads", "state_dtype", "max_seq_len", "trtllm_version"}
    assert {field.name for field in fields(Contract)} == {*OTHER, *FREE, *others}


def test_context_parallelism_on_both_sides() -> None:
    both = replace(BASE, cp_size=2)
    assert finding_ids(both, both) == ["error I4"]
    assert finding_ids(both, BASE) == []


def test_releases_that_differ() -> None:
    assert finding_ids(BASE, replace(BASE, trtllm_version="1.3.0rc21")) == ["warning I1"]
    assert finding_ids(BASE, replace(BASE, trtllm_version=None)) == []


@pytest.mark.parametrize(
    ("version", "pp_size", "tp_size", "expected"),
    [
        ("1.2.1", 2, 2, ["warning F11"]),
        ("1.2.0rc2", 2, 2, ["warning F11"]),
        ("1.2.1", 1, 2, []),
        ("1.2.1", 2, 1, []),
        ("1.1.0", 2, 2, []),
        ("1.3.0rc1", 2, 2, []),
        ("1.20.0", 2, 2, []),
        (None, 2, 2, []),
    ],
)
def test_stages_before_slices_hang_in_one_release(
    version: str | None, pp_size: int, tp_size: int, expected: list[str]
) -> None:
    decode = replace(BASE, trtllm_version=version, tp_size=tp_size)
    assert finding_ids(replace(decode, pp_size=pp_size), decode) == expected


def test_lengths() -> None:
    assert finding_ids(replace(BASE, max_seq_len=8192), BASE) == ["warning I8"]
    assert finding_ids(BASE, replace(BASE, max_seq_len=8192)) == []
    small = replace(BASE, max_tokens_in_buffer=1024)
    assert finding_ids(small, BASE) == ["warning I8"]
    assert finding_ids(BASE, replace(small, role="decode")) == ["warning I8"]
    assert finding_ids(small, replace(small, role="decode")) == ["warning I8", "warning I8"]
    assert finding_ids(replace(small, max_seq_len=None), BASE) == []
    # no longer than the other's own, whatever that is
    assert (
        finding_ids(BASE, replace(BASE, max_seq_len=None)) == finding_ids(replace(BASE, max_seq_len=None), BASE) == []
    )


CONTRACTS = st.builds(
    Contract,
    role=st.sampled_from(["prefill", "decode"]),
    model=st.sampled_from(["A", "B"]),
    num_layers=st.none() | st.integers(1, 2),
    kv_heads=st.none() | st.integers(1, 2),
    head_dim=st.none() | st.integers(1, 2),
    latent_attention=st.booleans(),
    index_head_dim=st.integers(0, 2),
    state_heads=st.integers(0, 2),
    state_dtype=st.none() | st.sampled_from(["float32", "bfloat16"]),
    kv_dtype=st.none() | st.sampled_from(["fp8", "auto"]),
    tokens_per_block=st.integers(1, 2),
    backend=st.none() | st.sampled_from(["UCX", "NIXL", "DEFAULT"]),
    runtime=st.sampled_from(["AUTO", "CPP", "PYTHON"]),
    tp_size=st.integers(1, 2),
    pp_size=st.integers(1, 2),
    cp_size=st.integers(1, 2),
    enable_attention_dp=st.booleans(),
    max_seq_len=st.none() | st.integers(1, 3),
    max_tokens_in_buffer=st.none() | st.integers(1, 3),
    trtllm_version=st.none() | st.sampled_from(["1.2.1", "1.3.0"]),
)


@given(CONTRACTS, CONTRACTS)
def test_errors_do_not_depend_on_who_is_who(one: Contract, other: Contract) -> None:
    errors = [
        sorted((finding.rule, finding.message) for finding in found if finding.severity is Severity.ERROR)
        for found in (check_contracts(one, other), check_contracts(other, one))
    ]
    assert errors[0] == errors[1]


@given(CONTRACTS)
def test_a_contract_is_plain_data_and_fits_itself(one: Contract) -> None:
    assert Contract(**json.loads(json.dumps(one.as_json()))) == one
    wrong = [finding for finding in check_contracts(one, one) if finding.severity is Severity.ERROR]
    assert [finding.rule for finding in wrong] == (["I4"] if one.cp_size > 1 else [])
