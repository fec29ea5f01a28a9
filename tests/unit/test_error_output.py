# SPDX-License-Identifier: Apache-2.0
"""Errors of every verb that offers JSON are JSON too, one object on stdout, where it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model, and engine configs of which one is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    Path("config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}))
    Path("none.yaml").write_text("- a list")
    Path("far.json").write_text("{")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check"], 64),
        (["check", "--tp-size", "x", "--model", "config.json"], 64),
        (["check", "--no-such-flag"], 64),
        (["check", "--model", "config.json", "--engine-config", "missing.yaml"], 65),
        (["check", "--model", "missing"], 66),
        (["plan", "--model", "missing", "--gpus", "8"], 66),
        (["plan", "--model", "config.json"], 64),
        (["local", "--no-such-flag"], 64),
        (["status", "--run-dir", "missing"], 64),
        (["wait", "--run-dir", "missing", "--timeout", "0.1"], 64),
        (["wait", "--role", "cook"], 64),
        (["no-such-verb"], 64),
    ],
)
@pytest.mark.parametrize("flag", [["--output", "json"], ["--output=json"], ["--out", "json"]])
def test_an_error_is_json_where_json_is_asked_for(
    words: list[str], code: int, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *flag]) == code
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert set(content) >= {"ok", "error"}
    assert (content["ok"], content["error"]["exit_code"]) == (False, code)
    assert set(content["error"]) == {"exit_code", "found", "needed", "fix"}
    assert content["error"]["found"] in err


@pytest.mark.parametrize("words", [["--output", "text"], [], ["--output"], ["--output", "yaml"]])
def test_and_nothing_where_it_is_not(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 64
    assert capsys.readouterr().out == ""


def test_an_error_as_plain_data() -> None:
    plain = UsageError("found", expected="needed", fix="fix").plain()
    assert plain == {"exit_code": 64, "found": "found", "needed": "needed", "fix": "fix"}
