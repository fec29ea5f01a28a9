# SPDX-License-Identifier: Apache-2.0
"""The engine configs that we ship: each says what it is for, and `dynamo-mpi check` finds nothing wrong with it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from tests.unit.model_zoo import ZOO
from tools.gen_docs.engine_configs import HEADER

FOLDER = Path(__file__).resolve().parents[2] / "engine_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
# the model in a file's header, and its config in the zoo
MODELS = {
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": "Llama-4-Maverick-17B-128E",
    "deepseek-ai/DeepSeek-R1": "DeepSeek-R1",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "Qwen/Qwen3-32B-FP8": "Qwen3-32B-FP8",
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen3-235B-A22B-FP8",
    "SmolLM2-135M-Instruct": "SmolLM2-135M",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(FOLDER))


def header(file: Path) -> re.Match[str]:
    found = HEADER.match(file.read_text(encoding="utf-8"))
    assert found is not None, f"{name_of(file)} doesn't say what it is for"
    return found


def model_of(file: Path, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(ZOO[MODELS[header(file)["model"]]]))
    return path


def run_check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", *words, "--output", "json"])
    out, err = capsys.readouterr()
    assert err == ""
    report: dict[str, Any] = json.loads(out)
    return code, report


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_check_finds_nothing_wrong(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = header(file)
    words = ["--model", str(model_of(file, tmp_path)), "--engine-config", str(file), "--role", head["role"]]
    words += ["--nodes", head["nodes"], "--gpus-per-node", head["gpus"]]
    words += ["--gpu", head["gpu"]] if head["gpu"] else []
    code, report = run_check(capsys, *words)
    problems = [(f["rule"], f["severity"]) for f in report["findings"] if f["severity"] != "info"]
    assert (code, problems) == (0, [])
    assert report["layout"]["world_size"] == int(head["nodes"]) * int(head["gpus"])


def test_what_the_issue_of_a_wide_deployment_needs_is_there() -> None:
    names = {name_of(file).removesuffix(".yaml") for file in FILES}
    assert {
        *(f"multimodal/llama4/{role}" for role in ("prefill", "decode", "agg")),
        "multimodal/llama4/prefill_tp8_1x8",
        "multimodal/llama4/decode_tp8_1x8",
        "multimodal/llama4/decode_tp8_ep8_1x8",
        "multimodal/llama4/decode_wide_ep16_2x8",
        "deepseek_r1/prefill_tp8_ep8",
        "deepseek_r1/decode_wide_ep32",
        "deepseek_r1/decode_tp8_cp2_helix_ep16",
    } <= names
    assert {name.partition("/")[0] for name in names} >= {"multimodal", "gpt_oss", "qwen3", "smollm2"}


def pairs() -> list[tuple[Path, Path]]:
    by_role = {
        role: [file for file in FILES if HEADER.match(file.read_text()) and header(file)["role"] == role]
        for role in ("prefill", "decode")
    }
    return [
        (prefill, decode)
        for prefill, decode in itertools.product(by_role["prefill"], by_role["decode"])
        if header(prefill)["model"] == header(decode)["model"]
    ]


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{name_of(pair[0])} and {name_of(pair[1])}")
def test_every_prefill_fits_every_decode(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model_of(pair[0], tmp_path))]
    for role, file in zip(("prefill", "decode"), pair, strict=True):
        words += [f"--{role}-engine-config", str(file), f"--{role}-nodes", header(file)["nodes"]]
    code, report = run_check(capsys, *words)
    assert (code, report["pair"]["findings"]) == (0, [])


def test_there_are_pairs() -> None:
    assert len(pairs()) >= 8
