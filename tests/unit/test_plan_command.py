# SPDX-License-Identifier: Apache-2.0
"""`dynamo-mpi plan`: the best layout first, with a YAML that `check` accepts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.settings import load_settings
from tests.unit.model_zoo import ZOO


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("MODEL_PATH", "ENGINE_CONFIG", "NUM_GPUS_PER_NODE", "DYN_MPI_GPU"):
        monkeypatch.delenv(name, raising=False)


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


def test_the_srun_line_is_one_that_the_worker_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, tmp_path, "Llama-3.1-70B", "--gpus", "16", "--output", "json")
    assert code == 0
    words = shlex.split(layouts(out)[0]["srun"])
    assert words[:2] == ["srun", "--mpi=pmix"]
    assert {"--nodes=2", "--ntasks-per-node=8", "--distribution=block", "--kill-on-bad-exit=1"} <= set(words)
    after = words[words.index("dynamo_mpi.worker") + 1 :]
    assert load_settings(after, {}).model == tmp_path / "config.json"


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
    assert main(["plan", "--model", str(config), "--gpus", "16", "--gpu", "h200", "--output", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    best = layouts(out)[0]
    assert (best["fits"], best["layout"]["world_size"]) == (True, 16)
    assert main(["check", "--model", str(config), "--tp-size", "1", "--gpus-per-node", "1", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == []
