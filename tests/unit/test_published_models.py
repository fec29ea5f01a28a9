# SPDX-License-Identifier: Apache-2.0
"""Weights and KV caches of public models against what is published of them, and against values computed by hand.

``tests/data/published_models.csv`` has a row for each model. ``source`` says where ``total`` is from, ``counts`` what it counts:

- ``parameters``: of the language model, without layers for multi-token prediction; ``with prediction``: with one of them;
- ``stored``: elements of the safetensors files as the hub counts them, a byte of packed weights or of a scale being one;
- ``packed``: the same without scales; ``packed with prediction``;
- ``bytes``: of the checkpoint.

``derivation`` is how ``kv_bytes_per_token``, ``windows`` (tokens:bytes per token) and ``state_bytes`` were computed by hand, on one rank.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.kv_cache import kv_bytes, state_bytes
from dynamo_mpi.layout.layer_weights import Part, Split, layer_parts
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.weights import checkpoint_bytes, checkpoint_parts, missing_sizes, stage_weights, total_parameters
from tests.unit.model_zoo import parsed

TABLE = Path(__file__).resolve().parents[1] / "data" / "published_models.csv"
with TABLE.open(encoding="utf-8", newline="") as _file:
    ROWS = list(csv.DictReader(_file))
TOTALS = [row for row in ROWS if row["total"]]
CACHES = [row for row in ROWS if row["kv_bytes_per_token"]]


def name_of(row: dict[str, str]) -> str:
    return row["model"]


def predicting(shape: ModelShape) -> list[Part]:
    """The parts of one layer for multi-token prediction, with the matrix that joins embedding and hidden state."""
    assert shape.nextn_layer is not None
    return [*layer_parts(shape, shape.nextn_layer, Split()), Part("mixer", 2 * (shape.hidden_size or 0) ** 2)]


def stored(part: Part) -> float:
    return part.elements * (1 if part.format is None else part.format.bytes_per_element)


def packed(part: Part) -> float:
    halved = part.format is not None and part.format.bytes_per_element < 1
    return part.elements / 2 if halved else part.elements


def summed(shape: ModelShape, size: Callable[[Part], float], *, prediction: bool) -> float:
    total = sum(size(part) * count for part, count in checkpoint_parts(shape))
    return total + (sum(map(size, predicting(shape))) if prediction else 0)


COUNTS: dict[str, Callable[[ModelShape], float]] = {
    "parameters": lambda shape: total_parameters(shape) or 0,
    "with prediction": lambda shape: summed(shape, lambda part: part.elements, prediction=True),
    "stored": lambda shape: summed(shape, stored, prediction=bool(shape.nextn_layers)),
    "packed": lambda shape: summed(shape, packed, prediction=False),
    "packed with prediction": lambda shape: summed(shape, packed, prediction=True),
    "bytes": lambda shape: checkpoint_bytes(shape) or 0,
}


@pytest.mark.parametrize("row", TOTALS, ids=name_of)
def test_weights_are_within_2_percent_of_the_published_total(row: dict[str, str]) -> None:
    shape = parsed(row["model"])
    assert missing_sizes(shape) == ()
    assert row["source"]
    assert COUNTS[row["counts"]](shape) == pytest.approx(float(row["total"]), rel=0.02)


@pytest.mark.parametrize("row", CACHES, ids=name_of)
def test_kv_and_state_bytes_are_those_computed_by_hand(row: dict[str, str]) -> None:
    assert row["derivation"]
    worker = LayoutSpec(parsed(row["model"]), EngineConfig(), Cluster(1, 1))
    (stage,) = stage_weights(worker) or ()
    windows = tuple((int(tokens), int(size)) for tokens, size in (pair.split(":") for pair in row["windows"].split()))
    assert kv_bytes(worker, stage) == (int(row["kv_bytes_per_token"]), windows)
    assert state_bytes(worker, stage) == int(row["state_bytes"] or 0)


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len({row["model"] for row in TOTALS}) >= 60
    assert len({row["model"] for row in CACHES}) >= 25


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_key_of_a_published_model_is_known(row: dict[str, str]) -> None:
    shape = parsed(row["model"])
    assert (shape.missing, shape.unread) == ((), ())
