# SPDX-License-Identifier: Apache-2.0
"""Builds the reference engine on one rank. Imports numpy, but not before its BLAS knows how many threads it may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.engines.reference.blas_threads import thread_environment
from dynamo_mpi.errors import EngineError

if TYPE_CHECKING:
    from mpi4py import MPI

    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.engines.spec import EngineSpec


def build_reference_engine(spec: EngineSpec, comm: MPI.Intracomm, local_size: int) -> Engine:
    """Build this rank's part of the reference engine.

    Raises:
        EngineError: a package that it needs is missing.
    """
    for name, value in thread_environment(local_size).items():
        os.environ.setdefault(name, value)
    try:
        from dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine
    except ImportError as error:
        raise EngineError(
            f"the reference engine can't be imported: {error}",
            needed="numpy",
            fix="pip install 'dynamo-mpi[local]'",
        ) from None
    given = {
        "max_batch_size": spec.max_batch_size,
        "max_num_tokens": spec.max_num_tokens,
        "max_seq_len": spec.max_seq_len,
        "kv_block_size": spec.tokens_per_block,
    }
    if spec.max_batch_size is not None and spec.max_num_tokens is None:
        # a step holds a token of every running request; who raised only the one meant both
        given["max_num_tokens"] = max(spec.max_batch_size, ReferenceConfig.max_num_tokens)
    sizes = {name: value for name, value in given.items() if value is not None}
    layout = {"tp_size": spec.tp_size, "pp_size": spec.pp_size, "cp_size": spec.cp_size}
    config = ReferenceConfig(
        Path(spec.model_dir),
        **layout,
        **sizes,
        serves_kv=spec.role == "prefill",
        kv_network=spec.kv_network or None,
        kv_keep_seconds=spec.kv_keep_seconds,
        kv_pull_seconds=spec.kv_pull_seconds,
    )
    return ReferenceEngine(comm, config)
