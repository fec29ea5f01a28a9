# SPDX-License-Identifier: Apache-2.0
"""What every rank needs to build its shard of the engine; rank 0 sends it with the preflight result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

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
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.
        kv_network: where prefill ranks serve KV, as ``--kv-network`` has it; empty for the host's own address.
        kv_keep_seconds: how long a prefill rank keeps KV that nobody fetches.
        kv_pull_seconds: how long fetching the KV of one request may take.
        probe: what is probed before the engine is built, as `HardwareCheckPlan.pack` writes it; empty for nothing.
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
    role: str = "agg"
    kv_network: str = ""
    kv_keep_seconds: float = 60.0
    kv_pull_seconds: float = 10.0
    probe: str = ""

    def pack(self) -> bytes:
        """Encode for the broadcast."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def unpack(cls, data: bytes) -> EngineSpec:
        """Decode what `pack` made."""
        return cls(**json.loads(data))


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
