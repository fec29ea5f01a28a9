# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader reads real files, and refuses everything else by a ModelError."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_mpi.engines.reference.gguf_file import GgufFile
from dynamo_mpi.engines.reference.gguf_tensors import GgufTensors
from dynamo_mpi.engines.reference.model_files import find_default_gguf
from dynamo_mpi.engines.reference.shape import llama_shape
from dynamo_mpi.engines.reference.weights import load_weights
from dynamo_mpi.errors import ModelError

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
F32, Q8_0 = 0, 8


@pytest.fixture(scope="module")
def default_file() -> GgufFile:
    return GgufFile(find_default_gguf())


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def small_gguf(*, tensor_type: int = F32, data: int = 64 * 4, extra: bytes = b"", extra_count: int = 0) -> bytes:
    """A GGUF of three metadata values and one tensor of 2 x 32."""
    metadata = (
        text("general.architecture") + struct.pack("<I", STRING) + text("llama")
        + text("a.number") + struct.pack("<If", FLOAT32, 0.5)
        + text("a.list") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("x") + text("yz")
    )  # fmt: skip
    tensor = text("t.weight") + struct.pack("<IQQIQ", 2, 32, 2, tensor_type, 0)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 3 + extra_count) + metadata + extra + tensor
    padding = -len(header) % 32
    return header + bytes(padding) + np.arange(data // 4, dtype=np.float32).tobytes()


def write(folder: Path, contents: bytes) -> Path:
    path = folder / "file.gguf"
    path.write_bytes(contents)
    return path


def test_it_reads_metadata_and_tensors(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path, small_gguf()))

    assert file.text("general.architecture") == "llama"
    assert file.number("a.number") == 0.5
    assert file.texts("a.list") == ["x", "yz"]
    assert file.integer("absent", 7) == 7
    target = np.empty((32, 1), np.float32)
    GgufTensors(file).fill_transposed(target, "t.weight", (2, 32), range(1, 2))
    assert target[:, 0].tolist() == list(range(32, 64))


def test_it_reads_the_default_model_like_the_gguf_package(default_file: GgufFile) -> None:
    reader = GGUFReader(default_file.path)

    assert set(default_file.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        entry = default_file.tensors[tensor.name]
        assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (entry.type_id, entry.offset) == (int(tensor.tensor_type), int(tensor.data_offset))


def test_parts_of_a_quantised_tensor_are_those_of_the_whole(default_file: GgufFile) -> None:
    tensors, shape = GgufTensors(default_file), (576, 1536)
    whole = np.empty((1536, 576), np.float32)
    tensors.fill_transposed(whole, "blk.0.ffn_down.weight", shape, range(576))
    part = np.empty((171, 10), np.float32)
    tensors.fill_transposed(part, "blk.0.ffn_down.weight", shape, range(5, 15), range(171, 342))

    assert np.array_equal(part, whole[171:342, 5:15])


@pytest.mark.parametrize("size", [0, 3, 4, 20, 24, 100, 5_000, 1_000_000])
def test_a_truncated_header_is_refused(tmp_path: Path, size: int) -> None:
    with find_default_gguf().open("rb") as file:
        path = write(tmp_path, file.read(size))

    with pytest.raises(ModelError) as refusal:
        GgufFile(path)

    assert str(path) in refusal.value.found


def test_missing_tensor_data_is_refused(tmp_path: Path) -> None:
    with find_default_gguf().open("rb") as file:
        path = write(tmp_path, file.read(40_000_000))

    with pytest.raises(ModelError, match="it is truncated"):
        load_weights(path, 0, 1)


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version is 1"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**60), "cannot fit"),
        (small_gguf(tensor_type=999), "unknown type 999"),
        (small_gguf(extra=text("k") + struct.pack("<II", 77, 0), extra_count=1), "unknown type 77"),
        (
            small_gguf(extra=text("k") + struct.pack("<IIQ", ARRAY, UINT32, 2**61), extra_count=1),
            "middle of its metadata",
        ),
        (small_gguf(extra=text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 2**61), extra_count=1), "nested too deeply"),
        (small_gguf(extra=text("general.alignment") + struct.pack("<II", UINT32, 0), extra_count=1), "alignment is 0"),
        (small_gguf(data=64), "truncated"),
    ],
)
def test_a_foreign_or_broken_file_is_refused(tmp_path: Path, contents: bytes, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        GgufTensors(GgufFile(write(tmp_path, contents)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(small_gguf()) - 1), replacement=st.binary(min_size=1, max_size=12))
def test_damage_gives_a_model_error_or_nothing(tmp_path: Path, position: int, replacement: bytes) -> None:
    contents = bytearray(small_gguf())
    contents[position : position + len(replacement)] = replacement
    path = write(tmp_path, bytes(contents))

    try:
        file = GgufFile(path)
        GgufTensors(file)
        llama_shape(file)
    except ModelError as error:
        assert error.needed


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile(tmp_path / "absent.gguf")


@pytest.mark.parametrize("key", ["general.architecture", "a.list", "absent"])
def test_a_value_of_another_type_is_refused(tmp_path: Path, key: str) -> None:
    file = GgufFile(write(tmp_path, small_gguf()))

    with pytest.raises(ModelError, match=key):
        file.integer(key)


def test_a_tensor_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    contents = bytearray(find_default_gguf().read_bytes())
    name = b"blk.7.ffn_norm.weight"
    start = contents.index(name)
    contents[start : start + len(name)] = b"blk.7.ffn_gate.biases"
    path = write(tmp_path, bytes(contents))

    with pytest.raises(ModelError, match=r"holds tensor blk\.7\.ffn_gate\.biases"):
        load_weights(path, 0, 1)
