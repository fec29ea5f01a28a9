# SPDX-License-Identifier: Apache-2.0
"""GGUF is converted once, number by number; ranks map their shares of the result, and refuse a file that is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from dynamo_mpi.engines.reference.weights import WEIGHTS_NAME, Float32Array, load_weights, open_model
from tests.conftest import ROOT
from tests.unit.small_llama import SHAPE, write_gguf

Write = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dynamo-mpi" / "models"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small llama as a model folder, beside ``small.gguf``."""
    scratch = tmp_path_factory.mktemp("small")
    return export_model(write_gguf(scratch / "small.gguf"), scratch / "model", copy=True)


@pytest.fixture(scope="module")
def decoded(small: Path) -> dict[str, Float32Array]:
    """What the gguf package makes of each tensor, ``[out, in]``."""
    tensors = GGUFReader(small.parent / "small.gguf").tensors
    return {tensor.name.removesuffix(".weight"): dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_each_share_is_a_slice_of_the_tensors(
    small: Path, decoded: dict[str, Float32Array], tp_size: int, pp_size: int
) -> None:
    model = open_model(small)
    for rank in range(tp_size * pp_size):
        weights = load_weights(model, rank, tp_size, pp_size)
        share, heads = weights.share, SHAPE.head_dim
        queries = slice(share.query_heads.start * heads, share.query_heads.stop * heads)
        keys = slice(share.kv_heads.start * heads, share.kv_heads.stop * heads)
        inner = slice(share.intermediate.start, share.intermediate.stop)
        vocabulary = slice(share.vocabulary.start, share.vocabulary.stop)
        for index, layer in zip(weights.stage.layers, weights.layers, strict=True):
            tensor = {name: decoded[f"blk.{index}.{name}"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
            gate, up, down = (decoded[f"blk.{index}.ffn_{name}"] for name in ("gate", "up", "down"))
            rows = (tensor["attn_q"][queries], tensor["attn_k"][keys], tensor["attn_v"][keys])
            assert np.array_equal(layer.query_key_value, np.concatenate(rows).T)
            assert np.array_equal(layer.gate_up, np.concatenate((gate[inner], up[inner])).T)
            assert np.array_equal(layer.attention_output, tensor["attn_output"].T[queries])
            assert np.array_equal(layer.down, down.T[inner])
            assert np.array_equal(layer.attention_norm, decoded[f"blk.{index}.attn_norm"])
            assert np.array_equal(layer.feed_forward_norm, decoded[f"blk.{index}.ffn_norm"])
            assert all(matrix.flags.c_contiguous for matrix in vars(layer).values())
        ends = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
        for name, source in ends.items():
            found, is_here = (
                getattr(weights, name),
                weights.stage.is_first if name == "embedding" else weights.stage.is_last,
            )
            assert (found is not None) == is_here
            if found is not None:
                whole = decoded[source]
                assert np.array_equal(found, whole if name == "final_norm" else whole[vocabulary].T)


def test_a_model_without_a_head_uses_its_embedding(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tied.gguf", without="output.weight")

    weights = load_weights(open_model(export_model(gguf, tmp_path / "model", copy=True)), 0, 2)

    assert weights.head is weights.embedding
    assert weights.head is not None


def test_the_sizes_and_the_fingerprint_are_in_the_file(small: Path, tmp_path: Path) -> None:
    same = export_model(small.parent / "small.gguf", tmp_path / "same", copy=True)
    other = export_model(write_gguf(tmp_path / "other.gguf", seed=1), tmp_path / "other", copy=True)

    model = open_model(small)

    assert {**vars(model.shape), "rms_norm_eps": 1e-5} == vars(SHAPE)
    assert model.shape.rms_norm_eps == pytest.approx(1e-5)
    assert model.fingerprint == open_model(same).fingerprint != open_model(other).fingerprint


def test_ranks_need_no_gguf_package(small: Path) -> None:
    code = "import sys; sys.modules['gguf'] = None\n"
    code += (
        "from pathlib import Path\nfrom dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine\n"
    )
    code += f"ReferenceEngine(None, ReferenceConfig(Path({str(small)!r}), 1)).load()\n"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_a_model_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    first = export_model(gguf, tmp_path / "first")
    monkeypatch.setitem(sys.modules, "gguf", None)  # so that a second conversion would fail

    second = export_model(gguf, tmp_path / "second")

    assert (first / WEIGHTS_NAME).resolve() == (second / WEIGHTS_NAME).resolve()
    assert (first / WEIGHTS_NAME).resolve().is_relative_to(cache)
    assert (second / "config.json").read_text() == (first / "config.json").read_text()


def test_a_change_of_one_byte_is_another_model(tmp_path: Path, cache: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    first = open_model(export_model(gguf, tmp_path / "first"))
    contents = bytearray(gguf.read_bytes())
    contents[len(contents) // 2] ^= 1
    gguf.write_bytes(contents)

    second = open_model(export_model(gguf, tmp_path / "second"))

    assert first.fingerprint != second.fingerprint
    assert len(list(cache.iterdir())) == 2


def test_many_may_convert_at_once(tmp_path: Path, cache: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(lambda number: export_model(gguf, tmp_path / f"model{number % 3}"), range(6)))

    assert len({open_model(folder).fingerprint for folder in folders}) == 1
    assert len(list(cache.iterdir())) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_a_home_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ModelNotFoundError, match="no home") as caught:
        export_model(write_gguf(tmp_path / "m.gguf"), tmp_path / "model")
    assert "XDG_CACHE_HOME" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "falcon"}, "its architecture is 'falcon'"),
        ({"values": {"llama.rope.dimension_count": 4}}, "rotates only a part"),
        ({"values": {"llama.attention.value_length": 16}}, "keys and values differ"),
        ({"values": {"llama.attention.head_count": 0}}, "0 attention heads"),
        ({"values": {"llama.attention.head_count_kv": 3}}, "3 key/value heads don't fit"),
        ({"values": {"llama.feed_forward_length": 0}}, "intermediate_size is 0"),
        ({"values": {"llama.feed_forward_length": 128}}, r"ffn_gate.weight has the shape \(64, 32\), not \(128, 32\)"),
        ({"without": "blk.1.attn_k.weight"}, r"lacks tensor blk\.1\.attn_k\.weight"),
        ({"shapes": {"blk.2.attn_q.bias": (32,)}}, r"holds tensor blk\.2\.attn_q\.bias, which"),
        ({"pre_tokenizer": "gpt-2"}, "tokenizer gpt2/gpt-2, which cannot be converted"),
        ({"values": {"tokenizer.ggml.bos_token_id": 40}}, "a special token beyond them"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelNotFoundError, match=complaint) as caught:
        export_model(write_gguf(tmp_path / "m.gguf", **changes), tmp_path / "model", copy=True)
    assert caught.value.expected
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", [0, 3, 24, 5_000, 1_000_000])
def test_a_gguf_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    with find_default_gguf().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))

    with pytest.raises(ModelNotFoundError, match=r"cut\.gguf is not a usable GGUF file"):
        export_model(tmp_path / "cut.gguf", tmp_path / "model", copy=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda contents: contents[:-10], "buffer is smaller"),
        (lambda contents: contents[:8], "Expecting value"),
        (lambda contents: b"", "empty"),
        (lambda contents: contents.replace(b"engine, 1", b"engine, 0"), "its format is"),
        (lambda contents: contents.replace(b'"down"', b'"dawn"'), "down"),
        (lambda contents: contents.replace(b"hidden_size", b"hidden_sise"), "hidden_sise"),
    ],
)
def test_a_damaged_weights_file_is_refused(
    small: Path, tmp_path: Path, change: Callable[[bytes], bytes], complaint: str
) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(change((small / WEIGHTS_NAME).read_bytes()))

    with pytest.raises(ModelNotFoundError, match=f"not a usable weights file: .*{complaint}") as caught:
        open_model(tmp_path)
    assert caught.value.fix.endswith(f"MODEL.gguf {tmp_path}")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 1500), replacement=st.binary(min_size=1, max_size=12))
def test_any_header_is_read_or_refused(small: Path, tmp_path: Path, position: int, replacement: bytes) -> None:
    contents = bytearray((small / WEIGHTS_NAME).read_bytes())
    contents[position : position + len(replacement)] = replacement
    path = tmp_path / WEIGHTS_NAME
    path.unlink(missing_ok=True)  # an earlier example's may be mapped
    path.write_bytes(bytes(contents))

    try:
        open_model(tmp_path)
    except ModelNotFoundError as error:
        assert error.expected


def test_a_folder_without_weights_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"holds no {WEIGHTS_NAME}") as caught:
        open_model(tmp_path)
    assert caught.value.fix == f"python -m dynamo_mpi.engines.reference.convert_gguf MODEL.gguf {tmp_path}"
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_model(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_weights_that_may_not_be_read_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"")
    (tmp_path / WEIGHTS_NAME).chmod(0)
    with pytest.raises(ModelNotFoundError, match="Permission denied"):
        open_model(tmp_path)
