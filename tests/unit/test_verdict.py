# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of the preflight: reading the files, and judging what the world answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.errors import DataError, ModelError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.parallelism.finding import errors
from dynamo_mpi.preflight.inquiry import Card
from dynamo_mpi.preflight.verdict import Plan, judge, read_plan
from dynamo_mpi.settings import load_settings
from tests.unit.models import LLAMA_4, SMOLLM2


def make_plan(folder: Path, config: dict[str, Any] = SMOLLM2, engine: str | None = None, *flags: str) -> Plan:
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(folder), *flags]
    if engine is not None:
        (folder / "engine.yaml").write_text(engine)
        argv += ["--engine-config", str(folder / "engine.yaml")]
    return read_plan(load_settings(argv, {}), argv)


def cards(*hosts: str, problems: dict[int, tuple[str, ...]] | None = None) -> list[Card]:
    return [Card(host, "", "1.0", (problems or {}).get(rank, ())) for rank, host in enumerate(hosts)]


def test_a_plan_holds_what_rank_0_has_read(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    plan = make_plan(tmp_path, SMOLLM2, "tensor_parallel_size: 3\nmax_batch_size: 2\n", "--max-batch-size", "5")
    assert plan.shape.attention_heads == 9
    assert (plan.config.tp_size, plan.config.max_batch_size) == (3, 2)
    assert plan.inquiry.model_dir == str(tmp_path)
    assert plan.inquiry.weights == ("a.safetensors", "b.safetensors")
    assert [file.label for file in plan.inquiry.files] == ["model config", "engine config"]
    for file in plan.inquiry.files:
        assert Path(file.path).read_text() == file.content


def test_without_an_engine_config_the_model_alone_is_watched(tmp_path: Path) -> None:
    assert [file.label for file in make_plan(tmp_path).inquiry.files] == ["model config"]


def test_a_missing_model_is_a_model_error(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "absent", "model folder .*absent"), (tmp_path, r"model config .*config\.json")):
        with pytest.raises(ModelError, match=f"{words}.* can't be read") as caught:
            read_plan(load_settings(["--model", str(folder)], {}), [])
        assert caught.value.exit_code == 66


def test_a_file_in_the_folders_place_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ModelError, match="Not a directory"):
        read_plan(load_settings(["--model", str(path)], {}), [])


@pytest.mark.parametrize("make", ["absent", "folder", "binary", "list"])
def test_a_bad_engine_config_is_a_data_error(tmp_path: Path, make: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "engine.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"a: \xff")
    elif make == "list":
        path.write_text("- a")
    with pytest.raises(DataError, match=r"engine\.yaml") as caught:
        read_plan(load_settings(["--model", str(tmp_path), "--engine-config", str(path)], {}), [])
    assert caught.value.exit_code == 65


def test_all_is_well_in_one_line(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, SMOLLM2, "tensor_parallel_size: 3")
    verdict = judge(plan, cards("n1", "n1", "n1"))
    assert verdict.exit_code is ExitCode.OK
    assert verdict.findings == ()
    assert "\n" not in verdict.report
    for word in ("ok", "LlamaForCausalLM", "tp 3", "3 ranks", "n1"):
        assert word in verdict.report


def test_a_layout_over_nodes_is_described(tmp_path: Path) -> None:
    engine = "tensor_parallel_size: 2\npipeline_parallel_size: 6"
    plan = make_plan(tmp_path, LLAMA_4, engine)
    report = judge(plan, cards(*["n1"] * 4, *["n2"] * 4, *["n3"] * 4)).report
    for word in ("tp 2", "pp 6", "12 ranks", "3 nodes", "n1", "n3"):
        assert word in report


P1, P2, P3 = "command line: is `a`", "engine config: /e differs", "model: /m lacks 1 of 2 weight files"


@pytest.mark.parametrize(
    ("engine", "answers", "code", "rules"),
    [
        ("tensor_parallel_size: 3", cards(*"aa"), ExitCode.USAGE, ["A1"]),
        ("tensor_parallel_size: 2", cards(*"aa"), ExitCode.ILLEGAL_LAYOUT, ["B1", "B3"]),
        ("tensor_parallel_size: 2", cards(*"aaa"), ExitCode.USAGE, ["A1", "B1", "B3"]),
        ("tensor_parallel_size: 3", cards(*"aab"), ExitCode.USAGE, ["A11"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P1,)}), ExitCode.USAGE, ["P1"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P2,)}), ExitCode.DATA, ["P2"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P3,)}), ExitCode.NO_MODEL, ["P3"]),
        ("tensor_parallel_size: 3", cards(*"aaa", problems={1: (P2, P3)}), ExitCode.DATA, ["P2", "P3"]),
        ("tensor_parallel_size: 3", [*cards(*"aa"), Card("a", "", "2.0", ())], ExitCode.USAGE, ["P4"]),
        ("tensor_parallel_size: 9", cards(*"aaaaaaaaa"), ExitCode.ILLEGAL_LAYOUT, ["E1"]),
        ("tensor_paralel_size: 3", cards("a"), ExitCode.DATA, ["H"]),
        ("tensor_parallel_size: 3\npipeline_parallel_size: 3", cards(*"aaabbbccc"), ExitCode.OK, []),
    ],
)
def test_the_first_error_decides_the_exit_code_and_all_are_reported(
    tmp_path: Path, engine: str, answers: list[Card], code: ExitCode, rules: list[str]
) -> None:
    verdict = judge(make_plan(tmp_path, SMOLLM2, engine), answers)
    assert verdict.exit_code is code
    assert [finding.rule for finding in errors(verdict.findings)] == rules
    if rules:
        assert ("1 error," if len(rules) == 1 else f"{len(rules)} errors,") in verdict.report
        assert "nothing was loaded" in verdict.report
    for rule in rules:
        assert f"error {rule}: " in verdict.report
