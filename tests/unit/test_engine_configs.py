# SPDX-License-Identifier: Apache-2.0
"""The engine configs that we ship are legal for the models they are named after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_mpi.parallelism.engine_config import parse_engine_config
from dynamo_mpi.parallelism.model_shape import parse_model_shape
from dynamo_mpi.parallelism.rules import check_layout

FOLDER = Path(__file__).resolve().parents[2] / "engine_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
MODELS = {
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
    }
}


def test_there_are_some() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_is_legal(file: Path) -> None:
    shape = parse_model_shape(json.dumps(MODELS[file.parent.name]), "config.json")
    config = parse_engine_config(file.read_text(encoding="utf-8"), str(file))
    assert check_layout(shape, config, config.world_size) == []
    assert config.max_seq_len is not None and shape.context_length is not None
    assert config.max_seq_len <= shape.context_length
