# SPDX-License-Identifier: Apache-2.0
"""What every rank needs to know to build its part of the engine: rank 0 sends it along with the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.fields import pack, unpack

if TYPE_CHECKING:
    from mpi4py import MPI

    from dynamo_mpi.engines.protocol import Engine


class EngineSpec(NamedTuple):
    """The engine to build. Sizes that are None are the engine's to choose.

    Args:
        engine: its name, as ``--engine`` has it.
        model_dir: the model folder.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        cp_size: context-parallel size.
        max_batch_size: requests in one step.
        max_num_tokens: tokens in one step.
        max_seq_len: prompt and output tokens of one request.
        tokens_per_block: tokens of a KV-cache block.
    """

    engine: str
    model_dir: str
    tp_size: int
    pp_size: int
    cp_size: int
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    tokens_per_block: int | None = None

    def pack(self) -> bytes:
        """Encode for the broadcast."""
        return pack(["" if value is None else str(value) for value in self])

    @classmethod
    def unpack(cls, data: bytes) -> EngineSpec:
        """Decode what `pack` made."""
        engine, model_dir, tp_size, pp_size, cp_size, *sizes = unpack(data)
        return cls(
            engine,
            model_dir,
            int(tp_size),
            int(pp_size),
            int(cp_size),
            *(int(size) if size else None for size in sizes),
        )


def build_engine(spec: EngineSpec, comm: MPI.Intracomm, local_size: int) -> Engine:
    """Build this rank's part; nothing is loaded yet.

    Args:
        spec: what to build.
        comm: a communicator over all ranks that is the engine's alone.
        local_size: ranks on this node, which share its cores.

    Raises:
        ValueError: there is no such engine.
    """
    if spec.engine == "reference":
        from dynamo_mpi.engines.reference.factory import build_reference_engine

        return build_reference_engine(spec, comm, local_size)
    raise ValueError(f"no engine is called {spec.engine!r}")
