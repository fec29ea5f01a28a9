# SPDX-License-Identifier: Apache-2.0
"""Lets all ranks of an engine agree on a result that may differ between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dynamo_mpi.engines.reference.collectives import wait_politely

if TYPE_CHECKING:
    from mpi4py import MPI

_TEXT_BYTES = 400


class Consensus(Protocol):
    """Collective operations: all ranks must call the same methods in the same order."""

    def lowest(self, values: Sequence[int]) -> list[int]:
        """Return, on every rank, the element-wise minimum of all ranks' values."""

    def texts(self, text: str) -> list[str]:
        """Return all ranks' texts by rank on rank 0; nothing on the others. Long texts are cut."""


class SingleRankConsensus:
    """A world of one rank."""

    def lowest(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def texts(self, text: str) -> list[str]:
        return [text]


class MpiConsensus:
    """Consensus over the engine's communicator; waits by sleeping, because a rank may be late.

    Args:
        communicator: all ranks of the engine.
    """

    def __init__(self, communicator: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self._communicator = communicator
        self._min = MPI.MIN

    def lowest(self, values: Sequence[int]) -> list[int]:
        mine = np.array(values, np.int64)
        agreed = np.empty_like(mine)
        wait_politely(self._communicator.Iallreduce(mine, agreed, self._min))
        lowest: list[int] = agreed.tolist()
        return lowest

    def texts(self, text: str) -> list[str]:
        encoded = text.encode(errors="replace")[:_TEXT_BYTES]
        mine = np.frombuffer(encoded.ljust(_TEXT_BYTES, b"\0"), np.uint8)
        leads = self._communicator.Get_rank() == 0
        everyone = np.empty((self._communicator.Get_size(), _TEXT_BYTES), np.uint8) if leads else None
        wait_politely(self._communicator.Igather(mine, everyone, root=0))
        if everyone is None:
            return []
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone]
