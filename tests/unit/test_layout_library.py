# SPDX-License-Identifier: Apache-2.0
"""`dynamo_mpi.layout` as a library: what it takes, returns and raises."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dynamo_mpi.layout as layout
from dynamo_mpi.cli.main import main
from dynamo_mpi.layout import (
    ConfigFileError,
    DynamoMpiError,
    EngineLayers,
    ModelNotFoundError,
    UsageError,
    Worker,
    check,
    check_pair,
    check_versions,
    find_model,
    plan,
)
from dynamo_mpi.layout.versions_report import describe_versions, known_versions
from tests.unit.model_zoo import ZOO

KEYS = {"tensor_parallel_size": 8, "moe_expert_parallel_size": 8}
H200 = Worker(gpus_per_node=8, gpu="h200")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "DeepSeek-R1.json"
    path.write_text(json.dumps(ZOO["DeepSeek-R1"]))
    return path


def test_every_name_of_the_library_is_there() -> None:
    assert sorted(layout.__all__) == layout.__all__
    for name in layout.__all__:
        assert getattr(layout, name).__module__.startswith("dynamo_mpi."), name
        assert name in dir(layout)
    with pytest.raises(AttributeError, match="no attribute 'chekc'"):
        _ = layout.chekc


def test_importing_layout_imports_nothing_of_it() -> None:
    code = "import sys, dynamo_mpi.layout; print([n for n in sys.modules if n.startswith('dynamo_mpi.layout.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_engine_config_is_a_path_a_mapping_or_layers(model: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "engine.yaml"
    yaml.write_text("tensor_parallel_size: 8\nmoe_expert_parallel_size: 8\n")
    expected = check(model, yaml, H200).as_json()
    assert expected["ok"] and expected["layout"]["moe_ep_size"] == 8
    assert check(str(model), str(yaml), H200).as_json() == expected
    assert check(find_model(str(model)), KEYS, H200).as_json() == expected
    assert check(model, EngineLayers(flags=KEYS), H200).as_json() == expected
    assert check(model, worker=H200).subject.layout.world_size == 1


def test_the_command_line_prints_what_the_library_returns(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(model), "--gpus-per-node", "8", "--gpu", "h200", "--output", "json"]
    assert main(["check", *words, "--tp-size", "8", "--ep-size", "16"]) == 78
    report = check(model, {**KEYS, "moe_expert_parallel_size": 16}, H200)
    assert (report.ok, report.exit_code) == (False, 78)
    assert json.loads(capsys.readouterr().out) == report.as_json()
    assert main(["plan", *words, "--gpus", "16"]) == 0
    assert json.loads(capsys.readouterr().out) == plan(model, 16, worker=H200).as_json()


def test_results_are_frozen_and_typed(model: Path) -> None:
    report = check(model, KEYS, H200)
    found = plan(model, 8, KEYS, H200)
    for result in (report, found, report.subject, found.layouts[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.subject = None  # type: ignore[misc,union-attr]
    assert (Path(layout.__file__).parents[1] / "py.typed").exists()


def test_nodes_follow_from_the_ranks_if_they_are_not_given(model: Path) -> None:
    worker = Worker(nodes=None, gpus_per_node=8)
    assert check(model, {**KEYS, "pipeline_parallel_size": 2}, worker).subject.cluster.nodes == 2
    assert check(model, {"tensor_parallel_size": 4}, worker).subject.cluster.nodes == 1
    assert check(model, KEYS, Worker(nodes=None)).subject.cluster.gpus_per_node == 8


def test_a_pair(model: Path) -> None:
    prefill = {**KEYS, "disable_overlap_scheduler": True, "cache_transceiver_config": {"backend": "UCX"}}
    decode = {**KEYS, "cache_transceiver_config": {"backend": "NIXL"}}
    report = check_pair(check(model, prefill, Worker(role="prefill")), check(model, decode, Worker(role="decode")))
    assert (report.prefill.ok, report.decode.ok, report.exit_code) == (True, True, 78)
    assert [finding.rule for finding in report.findings if finding.severity is layout.Severity.ERROR] == ["I6"]


@pytest.mark.parametrize(
    ("model_path", "config", "worker", "error"),
    [
        ("/nowhere", {}, Worker(), ModelNotFoundError),
        ("", "/nowhere.yaml", Worker(), ConfigFileError),
        ("", "a\0b", Worker(), ConfigFileError),
        ("", {"tensor_parallel_size": "eight"}, Worker(), ConfigFileError),
        ("", {"kv_cache_config": 3}, Worker(), ConfigFileError),
        ("", {"load_format": object()}, Worker(), ConfigFileError),
        ("", {}, Worker(role="encoder"), UsageError),
        ("", {}, Worker(role="encode", engine="reference"), UsageError),
        ("", {}, Worker(engine="vllm"), UsageError),
        ("", {}, Worker(gpu="h9000"), UsageError),
        ("", {}, Worker(trtllm_version="newest"), UsageError),
        ("", {}, Worker(nodes=0), UsageError),
        ("", {}, Worker(gpus_per_node=0), UsageError),
        ("", {}, Worker(nodes=2**40), UsageError),
        ("", {"tensor_parallel_size": 3}, Worker(nodes=2), UsageError),
    ],
)
def test_what_can_not_be_judged_is_a_documented_error(
    model: Path, model_path: str, config: Any, worker: Worker, error: type[DynamoMpiError]
) -> None:
    with pytest.raises(error) as caught:
        check(model_path or model, config, worker)
    error_found = caught.value
    assert error_found.problem and error_found.expected and error_found.fix
    assert int(error_found.exit_code) in (64, 65, 66)


def test_a_config_that_contains_itself_is_refused(model: Path) -> None:
    keys: dict[str, Any] = {"kv_cache_config": {}}
    keys["kv_cache_config"]["again"] = keys
    with pytest.raises(ConfigFileError, match="what YAML can't") as caught:
        check(model, keys)
    assert "yaml.safe_load" in caught.value.fix


def test_plan_refuses_what_is_no_number_of_gpus(model: Path) -> None:
    for gpus in (0, -8, 12, True, 2**40):
        with pytest.raises(UsageError) as caught:
            plan(model, gpus)
        assert caught.value.fix


def test_plan_without_a_layout_names_sizes_that_have_one(model: Path) -> None:
    report = plan(model, 67, worker=Worker(gpus_per_node=67))
    assert (report.layouts, report.ok, report.exit_code) == ((), False, 78)
    assert report.workable_sizes() == [62, 64, 66]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["tensor_parallel_size", "kv_cache_config", "moe_config", "pp_partition", "backend", "cp_config"]
)


@given(st.dictionaries(NAMES | st.text(max_size=12), VALUES, max_size=4))
def test_no_mapping_raises_anything_else(keys: dict[str, Any]) -> None:
    files = layout.ModelFiles("R1", "config.json", json.dumps(ZOO["DeepSeek-R1"]), None)
    try:
        check(files, keys)
    except (ConfigFileError, UsageError) as error:
        assert error.problem


# over versions


def test_versions_ascend_from_the_oldest_to_the_newest_known() -> None:
    assert known_versions()[0] == "1.0.0"
    assert {"1.1.0", "1.2.0"} < set(known_versions())
    assert known_versions()[-1].startswith("1.3.0rc")


def test_a_recipe_over_all_versions(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`transceiver_runtime` came with 1.2."""
    keys = {**KEYS, "cache_transceiver_config": {"backend": "NIXL", "transceiver_runtime": "PYTHON"}}
    report = check_versions(model, keys, H200)
    fails = [version for version, result in report.results if not result.ok]
    assert (fails, report.ok, report.exit_code) == (["1.0.0", "1.1.0"], False, 65)
    text = describe_versions("R1", report)
    assert "1.0.0         1 error  H\n1.1.0         1 error  H\n1.2.0         ok\n" in text
    assert text.count("1.0.0, 1.1.0:\nerror H: `cache_transceiver_config.transceiver_runtime` is known") == 1
    json_report = report.as_json()
    assert [entry["errors"] for entry in json_report["versions"]][:3] == [1, 1, 0]
    words = ["check", "--model", str(model), "--gpus-per-node", "8", "--gpu", "h200", "--trtllm-version", "all"]
    words += ["--override-engine-args", json.dumps(keys)]
    assert main([*words, "--output", "json"]) == 65
    assert json.loads(capsys.readouterr().out) == json_report
    assert main(words) == 65
    assert "DeepSeek-R1, role agg: tp 8 x ep 8 on 8 GPUs" in capsys.readouterr().out


def test_a_recipe_that_every_version_accepts_is_0(model: Path) -> None:
    report = check_versions(model, KEYS, H200)
    assert (report.ok, report.exit_code) == (True, 0)


def test_a_pair_over_all_versions(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for role, backend in (("prefill", "UCX"), ("decode", "NIXL")):
        (tmp_path / role).write_text(
            f"disable_overlap_scheduler: true\ncache_transceiver_config: {{backend: {backend}}}\n"
        )
    words = ["check", "--model", str(model), "--trtllm-version", "all"]
    words += ["--prefill-engine-config", str(tmp_path / "prefill"), "--decode-engine-config", str(tmp_path / "decode")]
    assert main([*words, "--output", "json"]) == 78
    report = json.loads(capsys.readouterr().out)
    assert [worker["role"] for worker in report["workers"]] == ["prefill", "decode"]
    for entry in report["versions"]:
        assert ("pair", "I6") in [(finding["of"], finding["rule"]) for finding in entry["findings"]]
    assert main(words) == 78
    assert "every version, pair:\nerror I6" in capsys.readouterr().out


def test_plan_takes_one_version(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--gpus", "8", "--trtllm-version", "all"]) == 64
    assert "'all' is not a version" in capsys.readouterr().err


def test_a_number_of_an_enumeration_is_read_as_the_engine_does(model: Path) -> None:
    assert check(model, {**KEYS, "load_format": 1}, Worker(gpus_per_node=8)).ok
    assert not check(model, {**KEYS, "load_format": 7}, Worker(gpus_per_node=8)).ok
