# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi check`: exit codes, JSON and text, from a real model's config to what is no config at all."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.cli.main import main
from tests.unit.model_zoo import ZOO


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("DYN_", "HF_", "NUM_")) or name == "MODEL_PATH" or name.endswith("ENGINE_CONFIG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_COLOR", "1")


class Check:
    """Runs the verb on models of the zoo and on YAML texts."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def model(self, name: str) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(ZOO[name]))
        return str(path)

    def yaml(self, text: str | bytes, name: str = "engine.yaml") -> str:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def run(self, *words: str) -> tuple[int, str, str]:
        code = main(["check", *words])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    def json(self, *words: str) -> tuple[int, dict[str, Any]]:
        code, out, err = self.run(*words, "--output", "json")
        assert err == ""
        report: dict[str, Any] = json.loads(out)
        return code, report


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(tmp_path, capsys)


def rules(report: dict[str, Any], severity: str = "error") -> list[str]:
    return [finding["rule"] for finding in report["findings"] if finding["severity"] == severity]


def test_a_legal_layout_is_0_and_says_all_that_design_promises(check: Check) -> None:
    engine = check.yaml("tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\n")
    code, report = check.json(
        "--model", check.model("Llama-4-Maverick-17B-128E"), "--engine-config", engine, "--gpus-per-node", "8"
    )
    assert (code, report["ok"]) == (0, True)
    layout = report["layout"]
    assert [layout[name] for name in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size", "nodes")] == [8, 1, 1, 8, 1]
    # ep 8 as it is said needs 8 ranks; heads alone allow more (B11)
    assert report["legal"] == {"tp": [8], "tp_by_heads": [1, 2, 4, 8, 40], "pp": [1, 2, 4, 8], "ep": [1, 2, 4, 8]}
    assert [rank["moe_ep_rank"] for rank in report["ranks"]] == list(range(8))
    assert report["groups"]["tp"] == [list(range(8))]
    assert report["memory"]["stages"][0]["kv_bytes_per_token"] > 0
    assert report["nearest"] == []


@pytest.mark.parametrize(
    ("model", "words", "code"),
    [
        ("Llama-4-Maverick-17B-128E", ("--tp-size", "8", "--gpu", "h200"), 0),
        ("Llama-3.1-70B", ("--tp-size", "4", "--pp-size", "2"), 0),
        ("DeepSeek-R1", ("--tp-size", "8", "--ep-size", "16", "--gpu", "h100"), 78),
        ("Phi-4", ("--tp-size", "8"), 78),
        ("Llama-3.1-405B", ("--tp-size", "8", "--gpu", "h100", "--trtllm-version", "1.2.1"), 78),
        ("gpt-oss-120b", ("--tp-size", "2", "--ep-size", "2", "--gpu", "b200"), 0),
        ("Qwen3-Next-80B-A3B", ("--tp-size", "2", "--role", "decode"), 78),
    ],
)
def test_ranks_and_memory_are_given_unless_the_layout_is_impossible(
    check: Check, model: str, words: tuple[str, ...], code: int
) -> None:
    found, report = check.json("--model", check.model(model), *words)
    assert found == code
    assert report["trtllm_version"] == ("1.2.1" if "1.2.1" in words else None)
    assert bool(report["ranks"]) == ("A2" not in rules(report))
    assert bool(report["memory"]) == ("A2" not in rules(report))


@pytest.mark.parametrize(
    ("model", "words", "legal"),
    [
        (
            "Llama-4-Maverick-17B-128E",
            ("--tp-size", "8"),
            {"tp": [1, 2, 4, 8], "tp_by_heads": [1, 2, 4, 8, 40], "pp": [1, 2, 4, 8], "ep": [1, 2, 4, 8]},
        ),
        # on as many ranks as needed: 9 is more than there are, and its MLP forbids it
        ("SmolLM2-135M", ("--tp-size", "3"), {"tp": [1, 3], "tp_by_heads": [1, 3, 9], "pp": [1, 3]}),
        # FP8's scaling blocks
        (
            "Qwen3-32B-FP8",
            ("--tp-size", "8", "--pp-size", "2"),
            {"tp": [1, 2, 4, 8], "tp_by_heads": [1, 2, 4, 8, 16, 32, 64], "pp": [1, 2, 4, 8, 16]},
        ),
        (
            "Llama-3.1-8B",
            ("--tp-size", "2", "--role", "decode"),
            {
                "tp": [1, 2, 4, 8, 16, 32],
                "tp_by_heads": [1, 2, 4, 8, 16, 32],
                "pp": [1, 2],
                "cp": [1, 2, 4, 8, 16],
            },
        ),
        (
            "DeepSeek-R1",
            ("--tp-size", "8", "--ep-size", "16"),
            {"tp_by_heads": [1, 2, 4, 8, 16, 32, 64, 128], "pp": []},
        ),
    ],
)
def test_the_legal_sizes(check: Check, model: str, words: tuple[str, ...], legal: dict[str, list[int]]) -> None:
    _, report = check.json("--model", check.model(model), *words)
    assert {name: report["legal"][name] for name in legal} == legal
    assert set(report["legal"]) - set(legal) <= {"tp", "ep"}
    assert ("ep" in report["legal"]) == (model in ("Llama-4-Maverick-17B-128E", "DeepSeek-R1"))


@pytest.mark.parametrize("model", ["Llama-4-Maverick-17B-128E", "DeepSeek-R1", "Phi-4", "Qwen3-Next-80B-A3B"])
def test_a_legal_size_is_one_that_check_takes(check: Check, model: str) -> None:
    path = check.model(model)
    flags = {"tp": "--tp-size", "pp": "--pp-size", "ep": "--ep-size"}
    _, report = check.json("--model", path, "--tp-size", "4")
    tried = 0
    for name, flag in flags.items():
        for size in (1, 2, 3, 4, 5, 8, 16):
            if name not in report["legal"] or (name != "tp" and 4 % size):
                continue
            words = ["--tp-size", str(size)] if name == "tp" else ["--tp-size", "4", flag, str(size)]
            code, found = check.json("--model", path, *words)
            layout_rules = [rule for rule in rules(found) if rule not in ("H", "J")]
            assert (size in report["legal"][name]) == (layout_rules == []), (name, size, code)
            tried += 1
    assert tried > 6


@pytest.mark.parametrize(
    ("model", "yaml", "nodes", "expected"),
    [
        ("Llama-4-Maverick-17B-128E", "tensor_parallel_size: 16", 2, "B1"),
        ("Phi-4", "tensor_parallel_size: 8", 1, "B3"),
        ("Qwen3-32B-FP8", "tensor_parallel_size: 16", 2, "E4"),
        ("DeepSeek-R1", "{tensor_parallel_size: 8, moe_expert_parallel_size: 16}", 1, "A2"),
        ("DeepSeek-R1", "{tensor_parallel_size: 16, moe_expert_parallel_size: 6}", 2, "A2"),
        ("Llama-3.1-8B", "tensor_parallel_size: 8", 2, "A1"),
        ("Llama-3.1-8B", "{tensor_parallel_size: 4, pipeline_parallel_size: 64}", 32, "F3"),
    ],
)
def test_an_illegal_layout_is_78_with_its_rule_and_what_would_work(
    check: Check, model: str, yaml: str, nodes: int, expected: str
) -> None:
    words = ["--model", check.model(model), "--engine-config", check.yaml(yaml)]
    code, report = check.json(*words, "--nodes", str(nodes), "--gpus-per-node", "8")
    assert (code, report["ok"]) == (78, False)
    assert expected in rules(report)
    assert report["nearest"]
    for other in report["nearest"]:
        layout = other["layout"]
        assert layout["world_size"] == layout["nodes"] * layout["gpus_per_node"]
    _, text, _ = check.run(*words, "--nodes", str(nodes), "--gpus-per-node", "8")
    assert f"error {expected}: " in text
    assert "layouts that would work:" in text
    assert "\x1b" not in text


def test_more_experts_than_ranks_gets_the_full_answer(check: Check) -> None:
    """TP8/EP16 on 8 ranks: why it can't be, and the shapes that give what was meant."""
    words = ["--model", check.model("DeepSeek-R1"), "--tp-size", "8", "--ep-size", "16", "--gpus-per-node", "8"]
    code, out, _ = check.run(*words)
    assert code == 78
    assert "ep_size 16 is more than the 8 ranks" in out
    for shape in ("TP16/EP16 with attention DP", "TP8/EP8/PP2", "TP8 x CP2 helix/EP16 on a decode worker"):
        assert out.count(shape) == 2, shape  # in the advice, and among the layouts that would work


def test_helix_is_not_offered_where_heads_do_not_allow_it(check: Check) -> None:
    model = check.model("Llama-4-Maverick-17B-128E")
    code, out, _ = check.run("--model", model, "--tp-size", "8", "--ep-size", "16", "--gpus-per-node", "8")
    assert (code, "helix" in out) == (78, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b", "not a mapping"),
        ("just words", "not a mapping"),
        ("a: [1", "not YAML"),
        ("tensor_parallel_size: 8\ntensor_parallel_size: 4", "is a duplicate"),
        ("kv_cache_config: {dtype: fp8, dtype: auto}", "is a duplicate"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("tensor_parallel_size: eight", "tensor_parallel_size is 'eight'"),
        ("tensor_parallel_size: -1", "tensor_parallel_size is -1"),
        ("tensor_parallel_size: 1.5", "tensor_parallel_size is 1.5"),
        ("tensor_parallel_size: 99999999999999999999", "tensor_parallel_size is 9"),
        ("moe_expert_parallel_size: -7", "moe_expert_parallel_size is -7"),
        ("kv_cache_config: 3", "kv_cache_config is 3"),
        ("kv_cache_config: {free_gpu_memory_fraction: .nan}", "free_gpu_memory_fraction is nan"),
        (b"a: \xff", "not text"),
        (b"a: 1 #" + b"x" * 2**23, "larger than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_engine_config_that_is_none_is_65(check: Check, text: str | bytes, words: str) -> None:
    engine = check.yaml(text)
    code, out, err = check.run("--model", check.model("Llama-3.1-8B"), "--engine-config", engine)
    assert (code, out) == (65, "")
    assert engine in err
    assert words in err


@pytest.mark.parametrize(("size", "code"), [(65536, 78), (65537, 65), (2**31 - 1, 65)])
def test_absurd_sizes_are_refused_at_once(check: Check, size: int, code: int) -> None:
    engine = check.yaml(f"tensor_parallel_size: {size}\nmoe_expert_parallel_size: {size}")
    for model in ("DeepSeek-R1", "Llama-3.1-8B"):
        found, _, _ = check.run("--model", check.model(model), "--engine-config", engine, "--gpus-per-node", "8")
        assert found == code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 65),
        (b"[]", 65),
        (b"{", 65),
        (b'{"num_attention_heads": "32"}', 65),
        (b'{"num_attention_heads": -1}', 65),
        (b'{"num_attention_heads": 1e400}', 65),
        (b'{"num_hidden_layers": 2000000000}', 65),
        (b'{"num_attention_heads": 1, "num_attention_heads": 2}', 65),
        (b'{"layer_types": ["full_attention"], "num_hidden_layers": 2}', 65),
        (b'{"quantization_config": {"modules_to_not_convert": 7, "quant_method": "fp8"}}', 65),
        (b"\xff\xfe", 65),
        (b" " * 2**23 + b"{}", 65),
        (b"[" * 100_000, 65),
        (b"{}", 0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_model_config_that_is_none_is_65(check: Check, content: bytes, code: int) -> None:
    path = check.folder / "config.json"
    path.write_bytes(content)
    found, out, err = check.run("--model", str(path), "--tp-size", "1", "--gpus-per-node", "1")
    assert found == code
    if code:
        assert out == ""
        assert str(path) in err
    else:
        assert "not in config.json, so not checked: num_attention_heads, num_hidden_layers" in out


@pytest.mark.parametrize("model", ["/nowhere", "no-such-user/Model", "a b", "./x/y/z", "x" * 5000, "a\0b"])
def test_a_model_that_is_not_there_is_66(check: Check, model: str) -> None:
    code, out, err = check.run("--model", model)
    assert (code, out) == (66, "")
    assert "expected: a model folder, its config.json, or a hub id" in err


def test_a_hub_id_is_found_in_the_cache(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = check.folder / "hub" / "hub" / "models--org--M" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(ZOO["Phi-4"]))
    monkeypatch.setenv("HF_HOME", str(check.folder / "hub"))
    code, report = check.json("--model", "org/M", "--tp-size", "8")
    assert (code, report["model"], rules(report)) == (78, "Phi3ForCausalLM", ["B3"])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--model", "m", "--nodes", "0"),
        ("--model", "m", "--nodes", "two"),
        ("--model", "m", "--nodes", "65537"),
        ("--model", "m", "--gpus-per-node", "2147483647"),
        ("--model", "m", "--gpu", "h1000"),
        ("--model", "m", "--role", "router"),
        ("--model", "m", "--output", "xml"),
        ("--model", "m", "--unknown"),
        ("--model", "m", "--trtllm.max_batch_size"),
    ],
    ids=" ".join,
)
def test_wrong_flags_are_64(check: Check, words: tuple[str, ...]) -> None:
    code, out, err = check.run(*words)
    assert (code, out) == (64, "")
    assert err.startswith("dynamo-mpi: ")


def test_a_version_that_is_none_is_64(check: Check) -> None:
    code, _, err = check.run("--model", check.model("Phi-4"), "--trtllm-version", "newest")
    assert code == 64
    assert "not a version of TensorRT-LLM" in err


def test_an_unknown_key_alone_is_bad_data(check: Check) -> None:
    engine = check.yaml("tensor_paralel_size: 8")
    code, report = check.json("--model", check.model("Llama-3.1-8B"), "--engine-config", engine)
    assert (code, rules(report)) == (65, ["H"])
    assert "tensor_parallel_size: 8" in report["findings"][0]["fix"]
    assert report["nearest"] == []


def test_the_version_decides_which_keys_are_known(check: Check) -> None:
    engine = check.yaml("enable_sleep: true")
    words = ["--model", check.model("Llama-3.1-8B"), "--engine-config", engine]
    for version, expected in (("1.3.0rc2", 0), ("1.3.0rc29", 65)):
        code, report = check.json(*words, "--trtllm-version", version)
        assert (code, "H" in [finding["rule"] for finding in report["findings"]]) == (expected, True), version


def test_overrides_lie_over_the_yaml_which_lies_over_flags(check: Check) -> None:
    engine = check.yaml("tensor_parallel_size: 4")
    words = ["--model", check.model("Llama-3.1-8B"), "--engine-config", engine, "--tp-size", "16"]
    code, report = check.json(*words)
    assert (code, report["layout"]["tp_size"], rules(report, "warning")) == (0, 4, ["H14"])
    code, report = check.json(*words, "--override-engine-args", '{"tensor_parallel_size": 2}')
    assert report["layout"]["tp_size"] == 2
    code, report = check.json(*words, "--trtllm.tensor_parallel_size", "8")
    assert report["layout"]["tp_size"] == 8
    code, _, err = check.run(*words, "--trtllm.tensor_parallel_size", "8", "--override-engine-args", "{}")
    assert (code, "Dynamo refuses both" in err) == (64, True)
    code, _, err = check.run(*words, "--override-engine-args", "{")
    assert (code, "--override-engine-args is not JSON" in err) == (65, True)


def test_the_environment_of_the_slurm_example_is_understood(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", check.model("Phi-4"))
    monkeypatch.setenv("ENGINE_CONFIG", check.yaml("tensor_parallel_size: 8"))
    monkeypatch.setenv("NUM_GPUS_PER_NODE", "8")
    code, report = check.json()
    assert (code, rules(report)) == (78, ["B3"])


PREFILL = "tensor_parallel_size: 8\ndisable_overlap_scheduler: true\ncache_transceiver_config: {backend: UCX}\n"
DECODE = "tensor_parallel_size: 16\nenable_attention_dp: true\ncache_transceiver_config: {backend: UCX}\n"


def pair(check: Check, prefill: str, decode: str, *words: str) -> tuple[int, dict[str, Any]]:
    configs = ["--prefill-engine-config", check.yaml(prefill, "p.yaml"), "--prefill-nodes", "1"]
    configs += ["--decode-engine-config", check.yaml(decode, "d.yaml"), "--decode-nodes", "2"]
    return check.json("--model", check.model("Llama-4-Maverick-17B-128E"), *configs, "--gpus-per-node", "8", *words)


def test_a_pair_is_checked_one_by_one_and_against_each_other(check: Check) -> None:
    code, report = pair(check, PREFILL, DECODE)
    assert (code, report["ok"], report["pair"]) == (0, True, {"ok": True, "findings": []})
    assert (report["prefill"]["role"], report["decode"]["layout"]["nodes"]) == ("prefill", 2)
    code, report = pair(check, PREFILL + "kv_cache_config: {dtype: fp8}\n", DECODE)
    assert (code, report["prefill"]["ok"], report["decode"]["ok"], report["pair"]["ok"]) == (78, True, True, False)
    (finding,) = report["pair"]["findings"]
    assert (finding["rule"], finding["found"]) == ("I1", "prefill fp8, decode bfloat16")


def test_a_pair_that_was_asked_for_wins_over_a_variable(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_CONFIG", check.yaml("tensor_parallel_size: 16"))
    code, report = pair(check, PREFILL, DECODE)
    assert (code, sorted(report)) == (0, ["decode", "ok", "pair", "prefill"])


def test_one_bad_worker_spoils_the_pair(check: Check) -> None:
    code, report = pair(check, PREFILL.replace("8", "16", 1), DECODE)
    assert (code, report["ok"], report["pair"]["ok"]) == (78, False, True)
    assert "B1" in rules(report["prefill"])


def test_half_a_pair_is_64(check: Check) -> None:
    engine = check.yaml(PREFILL)
    model = check.model("Phi-4")
    both = ("--prefill-engine-config", engine, "--decode-engine-config", engine)
    for words in (both[:2], both[2:], (*both, "--role", "prefill"), (*both, "--engine-config", engine)):
        code, _, err = check.run("--model", model, *words)
        assert (code, "--decode-engine-config" in err) == (64, True), words


def test_a_pair_may_stand_in_the_environment(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", check.model("Llama-4-Maverick-17B-128E"))
    monkeypatch.setenv("NUM_GPUS_PER_NODE", "8")
    monkeypatch.setenv("PREFILL_ENGINE_CONFIG", check.yaml(PREFILL, "p.yaml"))
    # one alone is no pair
    code, report = check.json()
    assert (code, report["role"], report["layout"]["tp_size"]) == (0, "agg", 1)
    monkeypatch.setenv("DECODE_ENGINE_CONFIG", check.yaml(DECODE, "d.yaml"))
    monkeypatch.setenv("NUM_DECODE_NODES", "2")
    code, report = check.json()
    assert (code, set(report)) == (0, {"ok", "prefill", "decode", "pair"})
    assert (report["decode"]["layout"]["nodes"], report["decode"]["layout"]["tp_size"]) == (2, 16)
    for role, tp_size, nodes in (("prefill", 8, 1), ("decode", 16, 2)):
        code, report = check.json("--role", role)
        layout = report["layout"]
        assert (code, report["role"], layout["tp_size"], layout["nodes"]) == (0, role, tp_size, nodes)
    code, report = check.json("--role", "decode", "--nodes", "4")
    assert (code, rules(report), report["layout"]["nodes"]) == (78, ["A1"], 4)
    # a worker's own config goes before
    engine = check.yaml("tensor_parallel_size: 4")
    code, report = check.json("--engine-config", engine)
    assert (code, report["role"], report["layout"]["tp_size"]) == (0, "agg", 4)
    code, report = check.json("--role", "decode", "--engine-config", engine)
    assert (code, rules(report), report["layout"]["tp_size"]) == (78, ["I6"], 4)
    monkeypatch.setenv("ENGINE_CONFIG", engine)
    code, report = check.json()
    assert (code, report["role"], report["layout"]["tp_size"]) == (0, "agg", 4)


@pytest.mark.parametrize("said", ["yaml", "environment", "flag"])
def test_a_small_worker_on_a_big_node_is_fine(check: Check, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    engine = check.yaml("tensor_parallel_size: 2\n" + ("gpus_per_node: 8\n" if said == "yaml" else ""))
    if said == "environment":
        monkeypatch.setenv("NUM_GPUS_PER_NODE", "8")
    words = ["--model", check.model("Llama-3.1-8B"), "--engine-config", engine]
    words += ["--gpus-per-node", "8"] if said == "flag" else []
    code, report = check.json(*words)
    assert (code, rules(report), rules(report, "warning")) == (0, [], [])
    assert "A1" in rules(report, "info")
    assert (report["layout"]["world_size"], report["layout"]["gpus_per_node"], len(report["ranks"])) == (2, 8, 2)
    assert report["groups"]["tp"] == [[0, 1]]
    # on two nodes all of their GPUs must be taken
    code, report = check.json(*words, "--nodes", "2")
    assert (code, rules(report)) == (78, ["A1"])
    # and more than a node has there are nowhere
    code, report = check.json(*words, "--override-engine-args", '{"tensor_parallel_size": 16}')
    assert (code, "A1" in rules(report)) == (78, True)


def test_memory_is_judged_where_the_gpu_is_known(check: Check) -> None:
    words = ["--model", check.model("Llama-3.1-405B"), "--tp-size", "8", "--gpus-per-node", "8"]
    code, report = check.json(*words)
    assert (code, report["memory"]["gpu"]) == (0, None)
    code, report = check.json(*words, "--gpu", "h100")
    assert (code, rules(report)) == (78, ["J"])
    # weights that leave nothing to the KV cache are an estimate's word: no error
    code, report = check.json(
        *("--model", check.model("DeepSeek-R1"), "--tp-size", "8", "--gpu", "h100", "--gpus-per-node", "8")
    )
    assert (code, rules(report), "J" in rules(report, "warning")) == (0, [], True)
    code, report = check.json(*words, "--gpu", "B200")
    assert (code, "J" in rules(report, "info")) == (0, True)
    assert report["memory"]["tokens"] > 0
    code, report = check.json(*words, "--gpu", "b200", "--min-requests", "1000000")
    assert (code, "J" in rules(report, "warning")) == (0, True)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_for_an_engine_config_end_in_a_code_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text(json.dumps(ZOO["SmolLM2-135M"]))
    (folder / "engine.yaml").write_bytes(content)
    code = main(["check", "--model", str(folder), "--engine-config", str(folder / "engine.yaml"), "--output", "json"])
    assert code in (0, 64, 65, 78)


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "dynamo_mpi", *words]


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_full_disk_is_64_with_a_message(check: Check, output: str) -> None:
    words = program("check", "--model", check.model("Phi-4"), "--output", output)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert done.stderr.startswith("dynamo-mpi: stdout can't be written: No space left on device\n")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("verb", [("check",), ("plan", "--gpus", "1")])
def test_a_closed_stdout_is_64_with_a_message(check: Check, verb: tuple[str, ...]) -> None:
    words = shlex.join(program(*verb, "--model", check.model("Phi-4")))
    done = subprocess.run(["/bin/sh", "-c", f"{words} >&-"], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert done.stderr.startswith("dynamo-mpi: stdout is closed\n")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_reader_that_has_gone_is_a_signal_s_code(check: Check) -> None:
    words = program("check", "--model", check.model("Phi-4"))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_package_is_a_program(check: Check) -> None:
    done = subprocess.run(
        program("check", "--model", check.model("Phi-4"), "--tp-size", "8"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (78, "")
    assert "error B3: " in done.stdout


def test_what_is_only_good_to_know_takes_one_line(check: Check) -> None:
    code, text, _ = check.run("--model", check.model("Llama-3.1-8B"), "--tp-size", "2", "--gpus-per-node", "8")
    assert code == 0
    lines = text.splitlines()
    assert sum(line.startswith("info ") for line in lines) >= 2
    assert not any(line.startswith("  ") for line in lines)


@pytest.mark.parametrize(
    ("architectures", "name"),
    [
        ("LlamaForCausalLM", "LlamaForCausalLM"),
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        ([], "llama"),
        ("", "llama"),
        (None, "llama"),
        ([7], "llama"),
        ({"a": 1}, "llama"),
    ],
)
def test_architectures_may_be_one_word(check: Check, architectures: Any, name: str) -> None:
    path = check.folder / "config.json"
    path.write_text(json.dumps(ZOO["Llama-3.1-8B"] | {"architectures": architectures}))
    code, report = check.json("--model", str(path))
    assert (code, report["model"]) == (0, name)


def test_a_name_that_cannot_be_printed_is_printed(check: Check) -> None:
    path = check.folder / "config.json"
    path.write_text(json.dumps(ZOO["Llama-3.1-8B"] | {"architectures": "Llama\ud800"}))
    assert check.run("--model", str(path))[0] == 0
    assert check.json("--model", str(path))[1]["model"] == "Llama?"


def test_what_the_memory_estimate_misses_is_unknown_too(check: Check) -> None:
    path = check.folder / "config.json"
    path.write_text(json.dumps({key: ZOO["Llama-3.1-8B"][key] for key in ZOO["Llama-3.1-8B"] if "intermed" not in key}))
    code, report = check.json("--model", str(path))
    assert (code, report["unknown"], report["memory"]) == (0, ["intermediate_size"], {})
    assert "not in config.json, so not checked: intermediate_size" in check.run("--model", str(path))[1]


def test_nothing_heavy_is_imported(check: Check) -> None:
    program = (
        "import sys; from dynamo_mpi.cli.main import main; code = main(sys.argv[1:]); "
        "print([m for m in ('mpi4py', 'numpy', 'pydantic', 'dynamo', 'importlib.metadata') if m in sys.modules], "
        "file=sys.stderr); sys.exit(code)"
    )
    for verb in (["check", "--tp-size", "8"], ["plan", "--gpus", "16", "--gpu", "h200"]):
        command = [sys.executable, "-c", program, *verb, "--model", check.model("DeepSeek-R1")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("name", list(ZOO))
def test_every_known_model_gets_a_verdict_and_a_plan(check: Check, name: str) -> None:
    code, report = check.json("--model", check.model(name), "--tp-size", "1", "--gpus-per-node", "1")
    assert (code, rules(report)) == (0, [])
    plan_code = main(["plan", "--model", check.model(name), "--gpus", "8", "--gpus-per-node", "8"])
    assert plan_code == 0


# roles


def test_a_role_of_the_worker_is_one_of_check_and_plan(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encode worker hands no KV over: no transceiver is missing, and beams are allowed."""
    model = check.model("Llama-3.1-8B")
    monkeypatch.setenv("DYN_MPI_ROLE", "encode")
    code, report = check.json("--model", model, "--max-beam-width", "2")
    assert (code, report["role"], rules(report)) == (0, "encode", [])
    code, out, _ = check.run("--model", model)
    assert (code, "role encode:" in out) == (0, True)
    assert main(["plan", "--model", model, "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "--role encode" in out and "cache_transceiver_config" not in out
    for other, known in (("pd", "agg"), ("prefill_and_decode", "agg"), ("prefill", "prefill")):
        monkeypatch.setenv("DYN_MPI_ROLE", other)
        assert check.json("--model", model)[1]["role"] == known
    monkeypatch.setenv("DYN_MPI_ROLE", "encoder")
    assert "one of agg, prefill, decode, encode" in check.run("--model", model)[2]


@pytest.mark.parametrize("role", ["prefill", "decode", "encode"])
def test_a_roles_own_engine_config_is_used(
    check: Check, role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = check.yaml("max_batch_size: 7\ndisable_overlap_scheduler: true\ncache_transceiver_config: {backend: NIXL}\n")
    monkeypatch.setenv(f"{role.upper()}_ENGINE_CONFIG", yaml)
    words = ("--model", check.model("Llama-3.1-8B"), "--role", role)
    assert check.run(*words)[0] == 0
    assert main(["plan", *words, "--gpus", "1"]) == 0
    assert "max_batch_size: 7" in capsys.readouterr().out


def test_the_reference_engine_has_no_encode_worker(check: Check) -> None:
    code, _, err = check.run("--model", check.model("Llama-3.1-8B"), "--role", "encode", "--engine", "reference")
    assert code == 64
    assert "the reference engine doesn't encode images" in err


# its start


def test_a_check_imports_nothing_that_takes_milliseconds(check: Check) -> None:
    """tests/bench/check_start.py measures the start; `dataclass` and `replace` come from `common.frozen`, paths are texts."""
    slow = (
        "dataclasses",
        "inspect",
        "pathlib",
        "shutil",
        "importlib.util",
        "shlex",
        "signal",
        "subprocess",
    )
    code = (
        # what argparse itself needs for an option: from Python 3.14 on `dataclasses` and `inspect`, for its colours
        "import argparse, sys; parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80)); "
        "parser.add_argument('--x'); before = set(sys.modules); from dynamo_mpi.cli.main import main; code = main(sys.argv[1:]); "
        f"print([name for name in {slow!r} if name in sys.modules and name not in before], file=sys.stderr); sys.exit(code)"
    )
    words = ["check", "--model", check.model("DeepSeek-R1"), "--engine-config", check.yaml("tensor_parallel_size: 8\n")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_the_process_prints_and_exits_as_the_function(check: Check) -> None:
    words = ["check", "--model", check.model("Phi-4"), "--tp-size", "8"]
    code, out, _ = check.run(*words[1:])
    done = subprocess.run([sys.executable, "-m", "dynamo_mpi", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, out) == (78, out)


def test_a_misspelt_variable_is_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_MPI_ENGIN", "reference")
    code, out, err = check.run("--model", check.model("Llama-3.1-8B"), "--output", "json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert err == "dynamo-mpi: warning: unknown variable DYN_MPI_ENGIN, which is ignored: is DYN_MPI_ENGINE meant?\n"
