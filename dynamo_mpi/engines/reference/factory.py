# SPDX-License-Identifier: Apache-2.0
"""Builds the reference engine on one rank. Imports numpy only after the number of BLAS threads is set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.os_errors import import_numpy

if TYPE_CHECKING:
    from mpi4py import MPI

    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.engines.spec import EngineSpec


_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def usable_cores() -> int:
    """Cores this process may run on; where the launcher has bound the rank, that is its own share."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def thread_environment(local_size: int, cores: int | None = None) -> dict[str, str]:
    """Return the variables that share ``cores`` between the ranks of one host.

    One core is left to whatever runs beside the ranks (the frontend, etcd, rank 0's own event loop). BLAS threads wait
    for each other by spinning: with a thread on every core and one of these busy, a step was measured to take
    107 instead of 15 ms, and 23 ms with one thread fewer.

    Args:
        local_size: ranks on this host.
        cores: cores they share; default ``usable_cores()``.

    Raises:
        ValueError: ``local_size`` is less than 1.
    """
    if local_size < 1:
        raise ValueError(f"local_size is {local_size}: it counts this rank too, so it is at least 1")
    threads = max(1, ((usable_cores() if cores is None else cores) - 1) // local_size)
    return {variable: str(threads) for variable in _VARIABLES}


def build_reference_engine(spec: EngineSpec, comm: MPI.Intracomm, local_size: int) -> Engine:
    """Build this rank's shard of the reference engine.

    Raises:
        EngineError: a package that the engine needs is missing.
        UsageError: no thread can be started.
    """
    for name, value in thread_environment(local_size).items():
        os.environ.setdefault(name, value)
    try:
        import_numpy()
        from dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine
    except ImportError as error:
        raise EngineError(
            f"the reference engine can't be imported: {error}",
            expected="numpy",
            fix="pip install 'dynamo-mpi[local]'",
        ) from None
    given = {
        "max_batch_size": spec.max_batch_size,
        "max_num_tokens": spec.max_num_tokens,
        "max_seq_len": spec.max_seq_len,
        "kv_block_size": spec.tokens_per_block,
    }
    if spec.max_batch_size is not None and spec.max_num_tokens is None:
        # a step must hold a token of every running request, so raising max_batch_size alone raises both
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
