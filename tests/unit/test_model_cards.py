# SPDX-License-Identifier: Apache-2.0
"""What counts of model cards, from cards as Dynamo writes them and from what is no card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.discovery import model_cards
from dynamo_mpi.discovery.etcd import KeyValue
from dynamo_mpi.discovery.model_cards import (
    ModelCard,
    PlannedCard,
    cards_of,
    describe_unlike,
    read_cards,
    unlike,
    unlike_models,
)
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.runtime.worker_record import planned_card

MODEL = {"config.json": b"{}", "tokenizer.json": b"abc", "tokenizer_config.json": b"t", "generation_config.json": b"g"}


def file(name: str, data: bytes) -> dict[str, Any]:
    return {"path": f"/models/m/{name}", "checksum": f"blake3:{blake3(data).hexdigest()}", "size": len(data)}


def content(**changes: Any) -> dict[str, Any]:
    """Return the part of a card that counts, as ai-dynamo 1.4.2 writes it."""
    return {
        "display_name": "m",
        "source_path": "/models/m",
        "model_info": {"hf_config_json": file("config.json", MODEL["config.json"])},
        "tokenizer": {"hf_tokenizer_json": file("tokenizer.json", MODEL["tokenizer.json"])},
        "prompt_formatter": {"hf_tokenizer_config_json": file("tokenizer_config.json", MODEL["tokenizer_config.json"])},
        "gen_config": {"hf_generation_config_json": file("generation_config.json", MODEL["generation_config.json"])},
        "architectural_max_context_length": 8192,
        "context_length": 2048,
        "kv_cache_block_size": 32,
        "model_type": "Chat | Completions",
        "worker_type": "aggregated",
        **changes,
    }


def entry(value: object, key: str = "dynamo/backend/generate/a1", revision: int = 1) -> KeyValue:
    data = value if isinstance(value, bytes) else json.dumps({"type": "Model", "card_json": value}).encode()
    return KeyValue(f"v1/mdc/{key}", data, revision, 7)


def card(**changes: Any) -> ModelCard:
    ((_, found),) = read_cards([entry(content(**changes))])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in MODEL.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_card_is_read() -> None:
    found = card()
    assert (found.model, found.worker, found.kind) == ("m", "backend/a1", "aggregated")
    assert set(found.files) == set(MODEL)
    assert (found.context_length, found.kv_block_size, found.model_context) == (2048, 32, 8192)
    assert card(worker_type="prefill").kind == "prefill"
    # of earlier releases
    assert card(worker_type=None, model_type="Prefill").kind == "prefill"
    assert card(worker_type=None).kind == "aggregated"


def test_what_is_no_card_is_left_out() -> None:
    strange: list[object] = [b"", b"[1]", b"{}", {}, {"display_name": None, "x": [1]}, b"\xff", "text", None]
    entries = [entry(value) for value in strange]
    # an adapter's, which has a word more, and a key of another depth
    entries += [entry(content(), "dynamo/backend/generate/a1/lora"), entry(content(), "dynamo/a1")]
    assert read_cards(entries) == []
    assert cards_of("ns") == "v1/mdc/ns/"
    assert cards_of("") == "v1/mdc/"


def test_equal_workers_fit_wherever_their_files_are(folder: Path) -> None:
    planned = PlannedCard("m", "aggregated", folder, None, 2048, 32)
    at_a_url = {
        "hf_tokenizer_json": {
            **file("tokenizer.json", MODEL["tokenizer.json"]),
            "path": "http://h:1/v1/x/tokenizer.json",
        }
    }
    assert planned.unlike([card(), card(tokenizer=at_a_url), card(runtime_config={"context_length": 1})]) == []
    assert unlike(card(), [card()]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_length": 1024}, "context length 2048 here, 1024 there"),
        ({"kv_cache_block_size": 64}, "KV block size 32 here, 64 there"),
        ({"prompt_formatter": {"x": file("tokenizer_config.json", b"other")}}, "(5 bytes) there"),
        (
            {"chat_template_file": {"y": {"file": file("chat_template.jinja", b"x")}}},
            "chat_template.jinja missing here",
        ),
        ({"tokenizer": {"z": file("tiktoken.model", b"x")}}, "tiktoken.model missing here"),
    ],
)
def test_what_differs_is_reported_with_both_values(changes: dict[str, Any], said: str, folder: Path) -> None:
    planned = PlannedCard("m", "aggregated", folder, None, 2048, 32)
    ((_, what),) = planned.unlike([card(**changes)])
    assert said in "; ".join(what)


def test_only_cards_of_the_same_name_and_kind_count(folder: Path) -> None:
    planned = PlannedCard("m", "aggregated", folder, None, 1, 1)
    assert planned.unlike([card(display_name="other"), card(worker_type="prefill"), card(worker_type="decode")]) == []
    assert len(planned.unlike([card()])) == 1


def test_the_models_files_are_not_read_for_cards_of_other_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = model_cards._read
    monkeypatch.setattr(model_cards, "_read", lambda path: reads.append(path) or read(path))  # type: ignore[func-returns-value]
    planned = PlannedCard("m", "aggregated", folder, None, 2048, 32)
    assert planned.unlike([card(display_name="other"), card(worker_type="prefill")]) == []
    assert reads == []
    assert planned.unlike([card()]) == []
    assert folder / "config.json" in reads


def test_the_workers_left_out_of_the_list_are_counted() -> None:
    others = [(card(), ["x"])] * 22
    assert describe_unlike("m", others[:21]).endswith("\n    and 1 other")
    assert describe_unlike("m", others).endswith("\n    and 2 others")


def test_what_isnt_known_before_the_load_isnt_compared(folder: Path) -> None:
    planned = PlannedCard("m", "aggregated", folder)
    # without a setting, the context is the model's own
    assert planned.unlike([card(context_length=8192, kv_cache_block_size=77)]) == []
    assert planned.unlike([card(context_length=2048, architectural_max_context_length=None)]) == []
    ((_, what),) = planned.unlike([card(context_length=2048)])
    assert what == ["context length 8192 here, 2048 there"]


def test_a_template_of_the_command_line_takes_the_place_of_the_folders(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_bytes(b"mine")
    planned = PlannedCard("m", "aggregated", folder, template, 2048, 32)
    theirs = {"hf_chat_template": {"is_custom": True, "file": file("mine.jinja", b"mine")}}
    assert planned.unlike([card(chat_template_file=theirs)]) == []
    assert len(planned.unlike([card()])) == 1


def test_without_blake3_sizes_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    planned = PlannedCard("m", "aggregated", folder, None, 2048, 32)
    same_size, other_size = ({"x": file("tokenizer_config.json", data)} for data in (b"T", b"other"))
    assert planned.unlike([card(), card(prompt_formatter=same_size)]) == []
    assert len(planned.unlike([card(prompt_formatter=other_size)])) == 1


def test_the_status_names_a_model_once() -> None:
    cards = [
        entry(content(), "dynamo/backend/generate/a1", 1),
        entry(content(), "dynamo/backend/generate/a2", 2),
        entry(content(context_length=1), "dynamo/backend/generate/a3", 3),
        entry(content(context_length=2), "dynamo/backend/generate/a4", 4),
        entry(content(context_length=9), "dynamo/prefill/generate/a5", 5),
        entry(content(context_length=9), "other/backend/generate/a6", 6),
    ]
    cards[4] = entry(content(context_length=9, worker_type="prefill"), "dynamo/prefill/generate/a5", 5)
    ((namespace, model, kind, line),) = unlike_models(read_cards(reversed(cards)))
    assert (namespace, model, kind) == ("dynamo", "m", "aggregated")
    assert "the cards of m in dynamo differ" in line
    assert ": context length 2048 at backend/a1, 1 at backend/a3; 1 more card unlike the first" in line


@pytest.mark.parametrize(
    ("words", "config", "context", "block"),
    [
        (("--engine", "reference"), "", 2048, 32),
        (("--engine", "reference"), "max_seq_len: 100\nkv_cache_config: {tokens_per_block: 8}", 100, 8),
        (("--engine", "trtllm"), "max_seq_len: 100\nkv_cache_config: {tokens_per_block: 8}", 100, None),
        (("--engine", "trtllm"), "", None, None),
    ],
)
def test_the_planned_card_is_that_of_the_engine(
    words: tuple[str, ...], config: str, context: int | None, block: int | None, folder: Path
) -> None:
    settings = load_settings(WorkerSources(["--model", str(folder), *words], {}))
    planned = planned_card(settings, merge(EngineLayers({}, config or None)).config, 8192)
    assert planned == PlannedCard(folder.name, "aggregated", folder, None, context, block)


def test_an_encode_worker_has_no_card(folder: Path) -> None:
    words = ["--model", str(folder), "--engine", "trtllm"]
    settings = load_settings(WorkerSources([*words, "--role", "encode"], {}))
    assert planned_card(settings, merge(EngineLayers()).config, None) is None
    settings = load_settings(WorkerSources([*words, "--role", "prefill", "--custom-jinja-template=/x.jinja"], {}))
    planned = planned_card(settings, merge(EngineLayers()).config, None)
    assert planned is not None
    assert (planned.kind, planned.template) == ("prefill", Path("/x.jinja"))
