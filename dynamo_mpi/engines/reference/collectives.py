# SPDX-License-Identifier: Apache-2.0
"""The two collectives of a forward pass, over MPI or for a world of one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from dynamo_mpi.engines.reference.weights import Float32Array

if TYPE_CHECKING:
    from mpi4py import MPI


class Collectives(Protocol):
    """What the transformer needs of the other ranks."""

    def sum_over_ranks(self, values: Float32Array) -> Float32Array:
        """Return the sum of all ranks' ``values`` on every rank; ``values`` itself may be overwritten."""

    def gather_columns(self, values: Float32Array, widths: tuple[int, ...]) -> Float32Array | None:
        """Put the ranks' ``[rows, widths[rank]]`` side by side on rank 0; None on the others."""


class SingleRank:
    """A world of one: nothing to exchange, and no MPI needed."""

    def sum_over_ranks(self, values: Float32Array) -> Float32Array:
        return values

    def gather_columns(self, values: Float32Array, widths: tuple[int, ...]) -> Float32Array | None:
        return values


class MpiCollectives:
    """Over a communicator that nobody else uses.

    Args:
        communicator: of all ranks of the engine, in the order of their shares.
    """

    def __init__(self, communicator: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self._communicator = communicator
        self._in_place = MPI.IN_PLACE

    def sum_over_ranks(self, values: Float32Array) -> Float32Array:
        values = np.ascontiguousarray(values)
        self._communicator.Allreduce(self._in_place, values)
        return values

    def gather_columns(self, values: Float32Array, widths: tuple[int, ...]) -> Float32Array | None:
        values = np.ascontiguousarray(values)
        if self._communicator.Get_rank() != 0:
            self._communicator.Gatherv(values, None, root=0)
            return None
        rows = len(values)
        received = np.empty(rows * sum(widths), np.float32)
        self._communicator.Gatherv(values, [received, [rows * width for width in widths]], root=0)
        ends = np.cumsum([rows * width for width in widths])[:-1]
        parts = np.split(received, ends)
        return np.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
