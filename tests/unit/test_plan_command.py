# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi plan`: the best layout first, with a YAML that `check` accepts."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_mpi.cli.main import main
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from tests.unit.model_zoo import ZOO


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for name in os.environ:
        if name.startswith(("DYN_", "NUM_")) or name == "MODEL_PATH" or name.endswith("ENGINE_CONFIG"):
            monkeypatch.delenv(name)


def run(capsys: pytest.CaptureFixture[str], folder: Path, model: str, *words: str) -> tuple[int, str, str]:
    (folder / "config.json").write_text(json.dumps(ZOO[model]))
    code = main(["plan", "--model", str(folder / "config.json"), *words])
    out, err = capsys.readouterr()
    return code, out, err


def layouts(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out)["layouts"]
    return found


@pytest.mark.parametrize("role", ["agg", "prefill", "decode"])
def test_every_yaml_is_accepted_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str) -> None:
    words = ("--gpus", "16", "--gpus-per-node", "8", "--gpu", "h200", "--role", role, "--output", "json")
    code, out, _ = run(capsys, tmp_path, "DeepSeek-R1", *words)
    assert code == 0
    engine = tmp_path / "engine.yaml"
    for made in layouts(out):
        engine.write_text(made["yaml"])
        cluster = ["--nodes", "2", "--gpus-per-node", "8", "--role", role, "--output", "json"]
        assert main(["check", "--model", str(tmp_path), "--engine-config", str(engine), *cluster]) == 0, made["name"]
        report = json.loads(capsys.readouterr().out)
        assert {name: report["layout"][name] for name in made["layout"]} == made["layout"]
    helix = [made for made in layouts(out) if made["layout"]["cp_size"] > 1]
    assert bool(helix) == (role == "decode")


SIZES = """
tensor_parallel_size: 3
pipeline_parallel_size: 5
moe_expert_parallel_size: 7
gpus_per_node: 11
pp_partition: [1, 2]
enable_attention_dp: true
"""
OTHER_KEYS = """
max_batch_size: 64
max_num_tokens: 4096
max_seq_len: 16384
enable_chunked_prefill: true
cuda_graph_config: null
scheduler_config: {capacity_scheduler_policy: GUARANTEED_NO_EVICT}
kv_cache_config: {free_gpu_memory_fraction: 0.8, enable_block_reuse: false, dtype: fp8}
moe_config: {backend: AUTO, max_num_tokens: 16384}
cache_transceiver_config: {backend: NIXL, transceiver_runtime: PYTHON, max_tokens_in_buffer: 16384}
attn_backend: TRTLLM
"""
LAYOUT_KEYS = {
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "cp_config",
    "moe_expert_parallel_size",
    "enable_attention_dp",
    "gpus_per_node",
    "pp_partition",
}


@pytest.mark.parametrize("role", ["agg", "prefill", "decode"])
@pytest.mark.parametrize(
    ("model", "gpus", "gpu", "config"),
    [
        ("DeepSeek-R1", 16, "h200", OTHER_KEYS),
        ("DeepSeek-R1", 8, "h200", SIZES + OTHER_KEYS),
        ("DeepSeek-R1", 8, "h200", "attn_backend: FLASHMLA\n"),
        ("Llama-3.1-8B", 4, "h100", SIZES + OTHER_KEYS),
        ("Qwen3-32B-FP8", 16, "h100", "kv_cache_config: {tokens_per_block: 64}\ncache_transceiver_config: null\n"),
        ("gpt-oss-120b", 8, "b200", "disable_overlap_scheduler: true\n"),
        ("Qwen3-Next-80B-A3B", 4, "h200", "kv_cache_config: {mamba_ssm_cache_dtype: float32}\n"),
    ],
)
def test_a_yaml_keeps_what_it_was_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, gpus: int, gpu: str, config: str, role: str
) -> None:
    asked = tmp_path / "asked.yaml"
    asked.write_text(config)
    common = ["--gpus-per-node", "8", "--gpu", gpu, "--role", role, "--output", "json"]
    code, out, err = run(capsys, tmp_path, model, "--gpus", str(gpus), "--engine-config", str(asked), *common)
    plans = json.loads(out)
    assert (code, err) == (0, "")
    assert not [finding for finding in plans["findings"] if finding["severity"] == "error"]
    kept = {key: value for key, value in yaml.safe_load(config).items() if key not in LAYOUT_KEYS}
    engine = tmp_path / "engine.yaml"
    for made in plans["layouts"]:
        engine.write_text(made["yaml"])
        written = yaml.safe_load(made["yaml"])
        added = set(written) - set(kept) - LAYOUT_KEYS
        assert added <= {"cache_transceiver_config", "disable_overlap_scheduler", "kv_cache_config"}
        for key, value in kept.items():
            if key == "cache_transceiver_config" and value is None and role != "agg":
                value = {"backend": "UCX"}
            if key == "kv_cache_config" and made["layout"]["cp_size"] > 1:
                value = value | {"tokens_per_block": written["cp_config"]["tokens_per_block"]}
            assert written[key] == value, key
        nodes = ["--nodes", str(made["layout"]["nodes"])]
        words = ["--gpus-per-node", str(made["layout"]["gpus_per_node"]), *common[2:]]
        found = main(["check", "--model", str(tmp_path), "--engine-config", str(engine), *nodes, *words])
        report = json.loads(capsys.readouterr().out)
        assert (report["layout"], report["memory"]) == (made["layout"], made["memory"]), made["name"]
        reported = [finding["rule"] for finding in report["findings"] if finding["severity"] == "error"]
        too_large = any(stage["weights_bytes"] > made["memory"]["gpu_bytes"] for stage in made["memory"]["stages"])
        assert (found, reported) == ((78, ["J"]) if too_large else (0, [])), made["name"]
        assert not too_large or made["fits"] is False


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("DeepSeek-R1", ("--gpus", "16", "--gpu", "h200", "--role", "decode", "--trtllm-version", "1.2.1")),
        ("DeepSeek-R1", ("--gpus", "8", "--gpu", "h100", "--trtllm.max_batch_size", "9999")),
        ("Llama-3.1-70B", ("--gpus", "16")),
        ("Gemma-3-27B", ("--gpus", "4", "--gpu", "h100")),
    ],
)
def test_a_plan_repeats_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, words: tuple[str, ...]
) -> None:
    _, out, _ = run(capsys, tmp_path, model, *words, "--output", "json")
    plans = json.loads(out)
    assert plans["trtllm_version"] == ("1.2.1" if "1.2.1" in words else None)
    assert ("--trtllm.max_batch_size" in words) == ("H2" in [finding["rule"] for finding in plans["findings"]])
    cluster = {(made["layout"]["nodes"], made["layout"]["gpus_per_node"]) for made in plans["layouts"]}
    assert cluster == {(plans["nodes"], plans["gpus_per_node"])}


@pytest.mark.parametrize(
    ("config", "rule", "expected"),
    [
        ("tensor_paralel_size: 8\n", "H", 65),
        ("kv_cache_config: {dtype: fp7}\n", "G1", 78),
        ("kv_cache_config: {free_gpu_memory_fraction: 1.5}\n", "H5", 78),
        ("tensor_paralel_size: 8\nkv_cache_config: {dtype: fp7}\n", "G1", 78),
        ("cache_transceiver_config: {backend: PIGEON}\n", "H", 65),
    ],
)
def test_what_no_layout_fixes_is_above_the_table_and_decides_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, rule: str, expected: int
) -> None:
    engine = tmp_path / "asked.yaml"
    engine.write_text(config)
    words = ("--gpus", "8", "--gpu", "h200", "--role", "decode", "--engine-config", str(engine))
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-8B", *words)
    assert code == expected
    assert -1 < out.index(f"error {rule}: ") < out.index("legal layouts")
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-8B", *words, "--output", "json")
    plans = json.loads(out)
    errors = [finding["rule"] for finding in plans["findings"] if finding["severity"] == "error"]
    assert (code, rule in errors, bool(plans["layouts"])) == (expected, True, True)


def test_where_nothing_fits_it_is_said_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-405B", "--gpus", "8", "--gpu", "h100")
    assert code == 78
    assert "by estimate none fits" in out
    assert "it fits on 2 nodes x 8 GPUs: " in out
    assert "srun" not in out and "engine.yaml" not in out
    # weights fit, and by estimate the cache doesn't: reported, and no error
    code, out, _ = run(capsys, tmp_path, "DeepSeek-R1", "--gpus", "8", "--gpu", "h100")
    assert (code, "none fits" in out, "srun" in out) == (0, True, False)
    # too much for the most nodes that are looked at
    words = ("--gpus", "1", "--gpus-per-node", "1", "--gpu", "l40s")
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-405B", *words)
    assert code == 78
    assert "take GPUs with more memory" in out


@pytest.mark.parametrize("role", ["agg", "prefill", "decode"])
def test_what_a_plan_adds_itself_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str) -> None:
    words = ("--gpus", "8", "--role", role, "--trtllm-version", "1.2.1", "--output", "json")
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-8B", *words)
    rules = {finding["rule"] for finding in json.loads(out)["findings"]}
    assert (code, rules & {"I6", "I9"}) == (0, set())


@pytest.mark.parametrize(
    ("model", "gpus", "nodes", "per_node", "engine"),
    [("Llama-3.1-70B", 16, 2, 8, "trtllm"), ("SmolLM2-135M", 3, 1, 3, "reference")],
)
def test_the_srun_line_is_one_that_the_worker_understands(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    gpus: int,
    nodes: int,
    per_node: int,
    engine: str,
) -> None:
    flags = () if engine == "trtllm" else ("--engine", engine)
    code, out, _ = run(capsys, tmp_path, model, "--gpus", str(gpus), *flags, "--output", "json")
    assert code == 0
    words = shlex.split(layouts(out)[0]["srun"])
    assert words[:2] == ["srun", "--mpi=pmix"]
    expected = {f"--nodes={nodes}", f"--ntasks-per-node={per_node}", "--distribution=block", "--kill-on-bad-exit=1"}
    assert expected <= set(words)
    after = words[words.index("dynamo_mpi.worker") + 1 :]
    assert after[:4] == ["--engine", engine, "--role", "agg"]
    settings = load_settings(WorkerSources(after, {}))
    assert (settings.model, settings.engine) == (tmp_path / "config.json", engine)


def test_tensor_parallelism_stays_inside_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, tmp_path, "Llama-3.1-70B", "--gpus", "16", "--gpu", "h100", "--output", "json")
    first = layouts(out)[0]
    assert (first["layout"]["tp_size"], first["layout"]["pp_size"]) == (8, 2)
    assert "tensor parallelism inside a node" in first["reasons"]


def test_as_text_there_is_a_table_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, tmp_path, "Llama-4-Maverick-17B-128E", "--gpus", "8", "--gpu", "h200", "--limit", "2")
    assert (code, err) == (0, "")
    assert "tensor_parallel_size: 8" in out
    assert "srun --mpi=pmix --nodes=1 --ntasks-per-node=8" in out
    assert "more: --limit" in out
    assert "\x1b" not in out


def test_colour_is_for_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ZOO["Phi-4"]))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["check", "--model", str(tmp_path), "--tp-size", "8"])
    assert "\x1b[31;1merror\x1b[0m B3" in capsys.readouterr().out


def test_a_number_that_no_layout_uses_is_78_with_numbers_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, tmp_path, "DeepSeek-V4-Flash", "--gpus", "24", "--gpus-per-node", "8")
    assert (code, out) == (78, "")
    assert "no layout of" in err
    assert "give the worker" in err


@pytest.mark.parametrize(
    ("words", "code"),
    [((), 64), (("--gpus", "12"), 64), (("--gpus", "0"), 64), (("--gpus", "8", "--gpu", "tpu"), 64)],
)
def test_wrong_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int) -> None:
    found, out, err = run(capsys, tmp_path, "Phi-4", *words)
    assert (found, out) == (code, "")
    assert err.startswith("dynamo-mpi: ")


def test_what_does_not_fit_is_listed_last_and_alone_it_is_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-405B", "--gpus", "8", "--gpu", "h100", "--output", "json")
    assert code == 78
    assert all(made["fits"] is False for made in layouts(out))
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-405B", "--gpus", "16", "--gpu", "h100", "--output", "json")
    fits = [made["fits"] for made in layouts(out)]
    assert (code, fits) == (0, sorted(fits, reverse=True))


CONFIGS = sorted((Path(__file__).resolve().parents[1] / "data" / "model_configs").glob("*.json"))
MODEL_CONFIGS = [path for path in CONFIGS if "hf_quant_config" not in path.name]


@pytest.mark.parametrize("config", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_a_real_model_is_read_and_gets_a_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = "b200" if "NVFP4" in config.stem else "h200"
    assert main(["plan", "--model", str(config), "--gpus", "16", "--gpu", gpu, "--output", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    best = layouts(out)[0]
    assert (best["fits"], best["layout"]["world_size"]) == (True, 16)
    assert main(["check", "--model", str(config), "--tp-size", "1", "--gpus-per-node", "1", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == []
