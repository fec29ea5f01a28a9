# SPDX-License-Identifier: Apache-2.0
"""The KV cache's data type, and what a token costs where heads aren't all alike."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo_mpi.layout.contract import contract_of
from dynamo_mpi.layout.engine_config import EngineConfig, KvCache
from dynamo_mpi.layout.kv_cache import kv_bytes, kv_dtype_known, kv_element_bytes, resolve_kv_dtype
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_shape import ModelShape
from dynamo_mpi.layout.quantisation import Quantisation
from dynamo_mpi.layout.weights import stage_weights
from tests.unit.test_weights import shape_of


def subject(shape: ModelShape, dtype: str = "auto", tp_size: int = 1) -> LayoutSpec:
    return LayoutSpec(shape, EngineConfig(tp_size=tp_size, kv_cache=KvCache(dtype=dtype)), Cluster(1, tp_size))


@pytest.mark.parametrize(
    ("said", "calibrated", "own", "dtype", "size"),
    [
        ("auto", None, "bfloat16", "bfloat16", 2),
        ("auto", None, "half", "float16", 2),
        ("auto", None, None, None, 2),
        ("auto", "FP8", "bfloat16", "fp8", 1),
        ("auto", "NVFP4", "bfloat16", "nvfp4", 0.5625),
        ("FP8", None, "bfloat16", "fp8", 1),
        ("bf16", "FP8", "float16", "bfloat16", 2),
        ("float", None, "bfloat16", "float32", 4),
        ("int4", None, "float32", "int4", 4),
    ],
)
def test_types(said: str, calibrated: str | None, own: str | None, dtype: str | None, size: float) -> None:
    quantisation = None if calibrated is None else Quantisation("NONE", kv_algo=calibrated)
    worker = subject(replace(shape_of("Llama-3.1-8B"), dtype=own, quantisation=quantisation), said)
    assert resolve_kv_dtype(worker) == contract_of(worker).kv_dtype == dtype
    assert kv_element_bytes(worker) == size
    assert kv_dtype_known(worker) == (dtype != "int4")


@pytest.mark.parametrize(("tp_size", "kv_heads", "windowed"), [(1, 4, 8), (4, 1, 2), (8, 1, 1)])
def test_values_shorter_than_keys_and_more_kv_heads_under_a_window(tp_size: int, kv_heads: int, windowed: int) -> None:
    worker = subject(shape_of("MiMo-V2-Flash"), tp_size=tp_size)
    (stage,) = stage_weights(worker) or ()
    assert kv_bytes(worker, stage) == (9 * kv_heads * (192 + 128) * 2, ((128, 39 * windowed * (192 + 128) * 2),))
