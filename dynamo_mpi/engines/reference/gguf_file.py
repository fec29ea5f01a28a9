# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: its metadata and the table of its tensors.

The reader of the ``gguf`` package builds an object per vocabulary entry, which takes seconds on every rank. This one
walks the header once, remembers where values are, and decodes one when it is asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynamo_mpi.errors import ModelError

_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS: dict[int, str] = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?")))
_SCALAR_FORMATS.update({10: "Q", 11: "q", 12: "d"})
_SCALARS = {kind: struct.Struct("<" + letter) for kind, letter in _SCALAR_FORMATS.items()}
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")
_HEADER = struct.Struct("<4sIQQ")
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_SMALLEST_METADATA_ENTRY = 8 + 4 + 1
_SMALLEST_TENSOR_ENTRY = 8 + 4 + 8 + 4 + 8

Scalar = int | float | bool | str


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table.

    Args:
        shape: outermost dimension first: ``(out, in)`` for a matrix.
        type_id: ``ggml_type`` of the stored values.
        offset: where the values begin, in bytes from the beginning of the file.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int


class GgufFile:
    """A GGUF file, open for reading.

    Args:
        path: a GGUF file of version 2 or 3, little-endian.

    Raises:
        ModelError: the file can't be read, is something else, or ends too early.
    """

    tensors: Mapping[str, TensorEntry]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        try:
            self._metadata, self.tensors = self._read_header()
        except struct.error:
            raise self.malformed("it ends in the middle of its header") from None

    @property
    def contents(self) -> mmap.mmap:
        """The whole file, read-only."""
        return self._bytes

    def malformed(self, what: str) -> ModelError:
        """Return the error that says ``what`` is wrong with this file."""
        return ModelError(
            f"{self.path} is not a usable GGUF file: {what}",
            needed="a complete GGUF file of version 2 or 3, little-endian",
            fix="fetch the file again and compare its size and checksum with the publisher's",
        )

    def __contains__(self, key: object) -> bool:
        return key in self._metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer of the metadata. Raises ModelError for another type, or none without a default."""
        value = self._scalar(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.malformed(f"{key} is {value!r}, not an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the metadata. Raises ModelError for another type, or none without a default."""
        value = self._scalar(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.malformed(f"{key} is {value!r}, not a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string of the metadata. Raises ModelError for another type, or none without a default."""
        value = self._scalar(key, default)
        if not isinstance(value, str):
            raise self.malformed(f"{key} is {value!r}, not a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings of the metadata. Raises ModelError if it is absent or something else."""
        return [value for value in self._array(key, _STRING) if isinstance(value, str)]

    def integers(self, key: str) -> list[int]:
        """Return an array of integers of the metadata. Raises ModelError if it is absent or something else."""
        values = self._array(key, None)
        if not all(isinstance(value, int) for value in values):
            raise self.malformed(f"{key} is not an array of integers")
        return [int(value) for value in values]

    def _read_header(self) -> tuple[dict[str, tuple[int, int]], dict[str, TensorEntry]]:
        magic, version, tensor_count, metadata_count = _HEADER.unpack_from(self._bytes, 0)
        if magic != b"GGUF":
            raise self.malformed(f"it begins with {magic!r}")
        if version not in (2, 3):
            raise self.malformed(f"its version is {version}")
        smallest = metadata_count * _SMALLEST_METADATA_ENTRY + tensor_count * _SMALLEST_TENSOR_ENTRY
        if smallest > len(self._bytes):
            raise self.malformed(f"it announces {metadata_count} values and {tensor_count} tensors, which cannot fit")
        position = _HEADER.size
        metadata: dict[str, tuple[int, int]] = {}
        for _ in range(metadata_count):
            key, position = self._string(position)
            (kind,) = _UINT32.unpack_from(self._bytes, position)
            metadata[key] = (kind, position + 4)
            position = self._skip(kind, position + 4, _MAX_ARRAY_DEPTH)
        found: dict[str, TensorEntry] = {}
        for _ in range(tensor_count):
            name, position = self._string(position)
            (dimensions,) = _UINT32.unpack_from(self._bytes, position)
            if dimensions > _MAX_DIMENSIONS:
                raise self.malformed(f"tensor {name} has {dimensions} dimensions")
            *sizes, type_id, offset = struct.unpack_from(f"<{dimensions}QIQ", self._bytes, position + 4)
            position += 4 + 8 * dimensions + 12
            found[name] = TensorEntry(tuple(reversed(sizes)), type_id, offset)
        alignment = _DEFAULT_ALIGNMENT
        if "general.alignment" in metadata:
            self._metadata = metadata
            alignment = self.integer("general.alignment")
            if alignment < 1:
                raise self.malformed(f"general.alignment is {alignment}")
        data_start = -(-position // alignment) * alignment
        return metadata, {
            name: TensorEntry(entry.shape, entry.type_id, data_start + entry.offset) for name, entry in found.items()
        }

    def _string(self, position: int) -> tuple[str, int]:
        """Return the string at ``position`` and where the next value begins."""
        (length,) = _UINT64.unpack_from(self._bytes, position)
        end = position + 8 + length
        if end > len(self._bytes):
            raise self.malformed(f"a string at byte {position} is said to have {length} bytes")
        return self._bytes[position + 8 : end].decode("utf-8", "replace"), end

    def _skip(self, kind: int, position: int, depth: int) -> int:
        """Return where the value after this one begins."""
        if kind == _STRING:
            return self._skip_strings(1, position)
        if kind == _ARRAY:
            (element,) = _UINT32.unpack_from(self._bytes, position)
            (count,) = _UINT64.unpack_from(self._bytes, position + 4)
            position += 12
            if element == _STRING:
                return self._skip_strings(count, position)
            if element == _ARRAY:
                if depth == 0 or count > len(self._bytes):
                    raise self.malformed("its metadata holds arrays nested too deeply")
                for _ in range(count):
                    position = self._skip(_ARRAY, position, depth - 1)
                return position
            end: int = position + count * self._scalar_format(element).size
        else:
            end = position + self._scalar_format(kind).size
        if end > len(self._bytes):
            raise self.malformed("it ends in the middle of its metadata")
        return end

    def _skip_strings(self, count: int, position: int) -> int:
        size, contents, read = len(self._bytes), self._bytes, _UINT64.unpack_from
        for _ in range(count):
            (length,) = read(contents, position)
            position += 8 + int(length)
            if position > size:
                raise self.malformed("it ends in the middle of its metadata")
        return position

    def _scalar_format(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise self.malformed(f"its metadata holds a value of unknown type {kind}")
        return _SCALARS[kind]

    def _scalar(self, key: str, default: Scalar | None) -> Scalar:
        if key not in self._metadata:
            if default is None:
                raise self.malformed(f"it lacks {key}")
            return default
        kind, position = self._metadata[key]
        if kind == _ARRAY:
            raise self.malformed(f"{key} is an array")
        if kind == _STRING:
            return self._string(position)[0]
        value: Scalar = _SCALARS[kind].unpack_from(self._bytes, position)[0]
        return value

    def _array(self, key: str, element_kind: int | None) -> list[Scalar]:
        if key not in self._metadata:
            raise self.malformed(f"it lacks {key}")
        kind, position = self._metadata[key]
        if kind != _ARRAY:
            raise self.malformed(f"{key} is not an array")
        (element,) = _UINT32.unpack_from(self._bytes, position)
        (count,) = _UINT64.unpack_from(self._bytes, position + 4)
        position += 12
        if element == _ARRAY or (element_kind is not None and element != element_kind):
            raise self.malformed(f"{key} is an array of type {element}")
        if element == _STRING:
            values: list[Scalar] = []
            for _ in range(count):
                text, position = self._string(position)
                values.append(text)
            return values
        return list(struct.unpack_from(f"<{count}{_SCALAR_FORMATS[element]}", self._bytes, position))


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", needed="a readable GGUF file", fix="check the path"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is empty", needed="a complete GGUF file", fix="fetch the file again") from error
