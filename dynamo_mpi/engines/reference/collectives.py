# SPDX-License-Identifier: Apache-2.0
"""What an engine's ranks do together: sums inside a stage, rows between stages, logits to rank 0, and agreement on a result that may differ.

Over MPI, or for one rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dynamo_mpi.engines.reference.shape import Stage
from dynamo_mpi.engines.reference.steps import sleep_seconds
from dynamo_mpi.engines.reference.weights import Float32Array

if TYPE_CHECKING:
    from mpi4py import MPI


class Collectives(Protocol):
    """The collectives of the ranks of one stage."""

    def sum_over_ranks(self, values: Float32Array) -> Float32Array:
        """Return the sum of all ranks' ``values`` on every rank; ``values`` itself may be overwritten."""

    def gather_columns(self, values: Float32Array, widths: tuple[int, ...]) -> Float32Array | None:
        """Concatenate the ranks' ``[rows, widths[rank]]`` on rank 0; None on the others."""


class SingleRank:
    """A world of one rank, without MPI."""

    def sum_over_ranks(self, values: Float32Array) -> Float32Array:
        return values

    def gather_columns(self, values: Float32Array, widths: tuple[int, ...]) -> Float32Array | None:
        return values


class MpiCollectives:
    """Collectives over a communicator of their own.

    Args:
        communicator: all ranks of the stage, in the order of their shards.
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


_HIDDEN_TAG, _LOGITS_TAG = 1, 2


class Pipeline(Protocol):
    """Communication between the stages."""

    def receive_hidden(self, tokens: int, hidden_size: int) -> Float32Array:
        """Receive ``[tokens, hidden]`` from the previous stage."""

    def send_hidden(self, hidden: Float32Array) -> None:
        """Send ``[tokens, hidden]`` to the next stage."""

    def return_logits(self, logits: Float32Array | None, rows: int, vocab_size: int) -> Float32Array | None:
        """Send the last stage's ``[rows, vocabulary]``, which one of its ranks has, to rank 0; None on all others."""


class SingleStage:
    """A single stage: the logits are on rank 0 already."""

    def receive_hidden(self, tokens: int, hidden_size: int) -> Float32Array:
        raise AssertionError("there is no stage before this one")

    def send_hidden(self, hidden: Float32Array) -> None:
        raise AssertionError("there is no stage after this one")

    def return_logits(self, logits: Float32Array | None, rows: int, vocab_size: int) -> Float32Array | None:
        return logits


class MpiPipeline:
    """Stages over the engine's communicator.

    Args:
        communicator: all ranks of all stages.
        tp_size: ranks of one stage.
        stage: this rank's stage.
    """

    def __init__(self, communicator: MPI.Intracomm, tp_size: int, stage: Stage) -> None:
        self._communicator = communicator
        self._rank = communicator.Get_rank()
        self._tp_size = tp_size
        self._stage = stage

    def receive_hidden(self, tokens: int, hidden_size: int) -> Float32Array:
        hidden = np.empty((tokens, hidden_size), np.float32)
        wait_politely(self._communicator.Irecv(hidden, self._rank - self._tp_size, _HIDDEN_TAG))
        return hidden

    def send_hidden(self, hidden: Float32Array) -> None:
        wait_politely(self._communicator.Isend(np.ascontiguousarray(hidden), self._rank + self._tp_size, _HIDDEN_TAG))

    def return_logits(self, logits: Float32Array | None, rows: int, vocab_size: int) -> Float32Array | None:
        if self._rank == 0:
            received = np.empty((rows, vocab_size), np.float32)
            wait_politely(self._communicator.Irecv(received, (self._stage.count - 1) * self._tp_size, _LOGITS_TAG))
            return received
        if logits is not None:
            wait_politely(self._communicator.Isend(np.ascontiguousarray(logits), 0, _LOGITS_TAG))
        return None


def wait_politely(request: MPI.Request) -> None:
    """Wait by sleeping, because the other stage may need the core."""
    began = time.monotonic()
    while not request.Test():
        time.sleep(sleep_seconds(time.monotonic() - began))


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
