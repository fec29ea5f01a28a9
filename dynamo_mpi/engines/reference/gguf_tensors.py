# SPDX-License-Identifier: Apache-2.0
"""Parts of a GGUF file's tensors as float32, so that a rank decodes no more than it keeps."""

from __future__ import annotations

import math

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from dynamo_mpi.engines.reference.gguf_file import GgufFile

Float32Array = NDArray[np.float32]

_ROWS_AT_A_TIME = 2048
"""Bounds the decoder's temporaries to some megabytes, whatever the size of the vocabulary."""


class GgufTensors:
    """The tensors of one file.

    Args:
        file: an open file; every tensor is checked against its size here.

    Raises:
        ModelError: a tensor is of an unknown type, or lies beyond the end of the file.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._contents = np.frombuffer(file.contents, np.uint8)
        self._types: dict[str, GGMLQuantizationType] = {}
        self._blocks: dict[str, tuple[int, int]] = {}
        for name, entry in file.tensors.items():
            try:
                kind = GGMLQuantizationType(entry.type_id)
            except ValueError:
                raise file.malformed(f"tensor {name} has the unknown type {entry.type_id}") from None
            self._types[name] = kind
            self._blocks[name] = block, block_bytes = GGML_QUANT_SIZES[kind]
            columns = entry.shape[-1] if entry.shape else 1
            end = entry.offset + math.prod(entry.shape[:-1]) * (columns // block) * block_bytes
            if columns % block:
                raise file.malformed(f"tensor {name} has rows of {columns} values, in blocks of {block}")
            if end > self._contents.size:
                raise file.malformed(f"tensor {name} ends at byte {end} of {self._contents.size}: it is truncated")

    def vector(self, name: str, size: int) -> Float32Array:
        """Return a whole tensor of one dimension. Raises ModelError if it is absent or of another size."""
        self._expect(name, (size,))
        row: Float32Array = self._decode(name, range(1), range(size))[0]
        return row

    def fill_transposed(
        self, target: Float32Array, name: str, shape: tuple[int, int], rows: range, columns: range | None = None
    ) -> None:
        """Write ``tensor[rows, columns]`` transposed into ``target``.

        Args:
            target: float32, ``[len(columns), len(rows)]``; may be a view into a larger matrix.
            name: a tensor ``[out, in]``.
            shape: what it must have.
            rows: contiguous range of the outer dimension.
            columns: contiguous range of the inner dimension; default all.

        Raises:
            ModelError: the tensor is absent, of another shape, or of a type that can't be decoded.
        """
        self._expect(name, shape)
        wanted = range(shape[1]) if columns is None else columns
        for start in range(rows.start, rows.stop, _ROWS_AT_A_TIME):
            part = range(start, min(start + _ROWS_AT_A_TIME, rows.stop))
            target[:, part.start - rows.start : part.stop - rows.start] = self._decode(name, part, wanted).T

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._file.tensors.get(name)
        if entry is None:
            raise self._file.malformed(f"it lacks tensor {name}")
        if entry.shape != shape:
            raise self._file.malformed(f"tensor {name} has the shape {entry.shape}, not {shape}")

    def _decode(self, name: str, rows: range, columns: range) -> Float32Array:
        """Return float32 ``[len(rows), len(columns)]``: columns are widened to whole blocks, then trimmed."""
        entry = self._file.tensors[name]
        block, block_bytes = self._blocks[name]
        row_bytes = entry.shape[-1] // block * block_bytes
        first, last = columns.start // block, -(-columns.stop // block)
        start = entry.offset + rows.start * row_bytes
        stored = self._contents[start : start + len(rows) * row_bytes].reshape(len(rows), row_bytes)
        stored = np.ascontiguousarray(stored[:, first * block_bytes : last * block_bytes])
        try:
            decoded = dequantize(stored, self._types[name])
        except NotImplementedError:
            raise self._file.malformed(
                f"tensor {name} is stored as {self._types[name].name}, which cannot be decoded here"
            ) from None
        values = np.asarray(decoded, np.float32)
        return values[:, columns.start - first * block : columns.stop - first * block]
