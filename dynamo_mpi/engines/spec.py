# SPDX-License-Identifier: Apache-2.0
"""What every rank needs to build its shard of the engine; rank 0 sends it with the preflight result."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import NamedTuple

COMPILING = frozenset({"trtllm"})
"""Engines that compile or tune kernels while they start, and keep them where `dynamo_mpi.stage.compile_caches` says."""


class EngineSpec(NamedTuple):
    """The engine to build. The engine chooses sizes that are None.

    Args:
        engine: its name, a value of ``--engine``; empty if only ``stage`` is done.
        model_dir: the model directory.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        cp_size: context-parallel size.
        max_batch_size: requests in one step.
        max_num_tokens: tokens in one step.
        max_seq_len: prompt and output tokens of one request.
        tokens_per_block: tokens of a KV-cache block.
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.
        kv_network: the network in which prefill ranks serve KV, see ``--kv-network``; empty for the host's own address.
        kv_keep_seconds: how long a prefill rank keeps KV that is not fetched.
        kv_pull_seconds: how long fetching the KV of one request may take.
        probe: the hardware checks that run before the engine is built, from `HardwareCheckPlan.pack`; empty for none.
        bind: the CPUs and memory nodes to which ranks bind themselves, from `checks.binding.pack`; empty for none.
        stage: what is copied to the nodes before the engine is built, from `StagePlan.pack`; empty for nothing.
        caches: from where the ranks' compile caches are seeded, from `CachePlan.pack`; empty to leave them alone.
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
    bind: str = ""
    stage: str = ""
    caches: str = ""

    def pack(self) -> bytes:
        """Encode it for the broadcast."""
        # every file that a rank opens before the preflight result counts
        import json

        return json.dumps(self._asdict()).encode()

    @classmethod
    def unpack(cls, data: bytes) -> EngineSpec:
        """Decode the result of `pack`."""
        import json

        return cls(**json.loads(data))
