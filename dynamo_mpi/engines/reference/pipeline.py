# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: each stage holds some layers, and hands its rows on to the next.

Ranks are numbered as TensorRT-LLM numbers them: tensor parallelism fastest, pipeline slowest (its ``MpiTopology``), so that
with blocks of ranks per node the tensor-parallel sums stay inside a node and only one row per token crosses between nodes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dynamo_mpi.engines.reference.gguf_tensors import Float32Array
from dynamo_mpi.engines.reference.shape import part_of
from dynamo_mpi.engines.reference.step_channel import sleep_seconds
from dynamo_mpi.errors import LayoutError

if TYPE_CHECKING:
    from mpi4py import MPI

_HIDDEN_TAG, _LOGITS_TAG = 1, 2


@dataclass(frozen=True)
class Stage:
    """The layers of one rank.

    Args:
        index: of this stage, from 0.
        count: of all stages.
        layers: global numbers of its layers.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def stage_of(layers: int, rank: int, tp_size: int, pp_size: int) -> Stage:
    """Return the stage of ``rank``; the first stages hold one layer more where it doesn't come out even (F1: ``mapping.py: pp_layers``).

    Raises:
        LayoutError: there are more stages than layers (F3).
    """
    if layers < pp_size:
        raise LayoutError(
            f"{layers} layers are not enough for pipeline_parallel_size {pp_size}",
            needed=f"pipeline_parallel_size of at most {layers}",
            fix="lower pipeline_parallel_size in the engine config and start fewer ranks",
        )
    index = rank // tp_size
    return Stage(index, pp_size, part_of(layers, pp_size, index))


class Pipeline(Protocol):
    """What the transformer needs of the other stages."""

    def receive_hidden(self, tokens: int, hidden_size: int) -> Float32Array:
        """Return ``[tokens, hidden]`` of the stage before."""

    def send_hidden(self, hidden: Float32Array) -> None:
        """Hand ``[tokens, hidden]`` to the stage after."""

    def return_logits(self, logits: Float32Array | None, rows: int, vocab_size: int) -> Float32Array | None:
        """Bring the last stage's ``[rows, vocabulary]``, which one rank of it holds, to rank 0; None on all others."""


class SingleStage:
    """No pipeline: the logits are where they are needed."""

    def receive_hidden(self, tokens: int, hidden_size: int) -> Float32Array:
        raise AssertionError("there is no stage before this one")

    def send_hidden(self, hidden: Float32Array) -> None:
        raise AssertionError("there is no stage after this one")

    def return_logits(self, logits: Float32Array | None, rows: int, vocab_size: int) -> Float32Array | None:
        return logits


class MpiPipeline:
    """Over the engine's communicator of all ranks.

    Args:
        communicator: all ranks of all stages.
        tp_size: ranks of one stage.
        stage: this rank's.
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
    """Wait without burning the core that the stage waited for may need."""
    began = time.monotonic()
    while not request.Test():
        time.sleep(sleep_seconds(time.monotonic() - began))
