# SPDX-License-Identifier: Apache-2.0
"""World records to test with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dynamo_mpi.discovery.records import RecordedLayout, StoredRecord, WorkerRecord
from dynamo_mpi.layout.contract import Contract

CONTRACT = Contract(
    role="prefill",
    model="LlamaForCausalLM",
    num_layers=32,
    kv_heads=8,
    head_dim=128,
    latent_attention=False,
    index_head_dim=0,
    state_heads=0,
    state_dtype=None,
    kv_dtype="fp8",
    tokens_per_block=32,
    backend="NIXL",
    runtime="CPP",
    tp_size=8,
    pp_size=1,
    cp_size=1,
    enable_attention_dp=False,
    max_seq_len=None,
    max_tokens_in_buffer=None,
    trtllm_version="1.3.0rc22",
)


def world(role: str = "prefill", contract: dict[str, Any] | None = None, **changes: Any) -> WorkerRecord:
    """Return the record of a worker.

    Args:
        role: its role.
        contract: what its contract has of its own.
        changes: what else is different.
    """
    paired = role in ("prefill", "decode")
    component = role if role == "prefill" else "backend"
    record = WorkerRecord(
        role=role,
        engine="trtllm",
        namespace="dynamo",
        component=component,
        endpoint=f"dyn://dynamo.{component}.generate",
        model="M",
        phase="preflight",
        layout=RecordedLayout(8, 1, 1, 1, False, 8, 8),
        hosts=(f"{role}1", f"{role}2"),
        contract=replace(CONTRACT, role=role, **(contract or {})) if paired else None,
        dynamo_mpi="0.1.0",
        trtllm="1.3.0rc22",
        job="12",
        step="0",
        started=1.5e9,
        pid=4711,
        host=f"{role}1",
    )
    return replace(record, **changes)


def posted(record: WorkerRecord, came: int) -> StoredRecord:
    """Return ``record`` as it would stand in etcd."""
    return StoredRecord(f"dynamo_mpi/v1/worlds/{record.namespace}/{record.component}/{came:x}", came, record)
