# SPDX-License-Identifier: Apache-2.0
"""Writes down a layout: the YAML for the engine, and the line that starts its ranks."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from dynamo_mpi.parallelism import defaults
from dynamo_mpi.parallelism.alternatives import short_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.parallelism.subject import Subject


def engine_yaml(subject: Subject, model: str) -> str:
    """Write the engine config of a layout: its sizes, and what its role can't do without.

    Args:
        subject: the worker.
        model: its name, for the comment.
    """
    return "\n".join(_lines(subject, model)) + "\n"


def _lines(subject: Subject, model: str) -> Iterator[str]:
    layout, cluster, role = subject.layout, subject.cluster, subject.role
    yield f"# {model}: {short_name(subject)}, {cluster}, role {role}"
    yield f"tensor_parallel_size: {layout.tp_size}"
    yield f"pipeline_parallel_size: {layout.pp_size}"
    if layout.cp_size > 1:
        block = subject.config.kv_cache.tokens_per_block or defaults.TOKENS_PER_BLOCK
        yield f"context_parallel_size: {layout.cp_size}"
        yield f"cp_config: {{cp_type: {layout.cp_type}, tokens_per_block: {block}}}"
        yield f"kv_cache_config: {{tokens_per_block: {block}}}"
    if subject.shape.experts is not None:
        yield f"moe_expert_parallel_size: {layout.moe_ep_size}"
    yield f"enable_attention_dp: {str(layout.enable_attention_dp).lower()}"
    yield f"gpus_per_node: {cluster.gpus_per_node}"
    if role == "prefill":
        yield "disable_overlap_scheduler: true"
    if role != "agg":
        yield "cache_transceiver_config: {backend: UCX}"


def srun_line(subject: Subject, model: str, engine_config: str) -> str:
    """Write the line that starts a worker's ranks on Slurm.

    Args:
        subject: the worker.
        model: model folder, as ``--model`` takes it.
        engine_config: the engine config's path.
    """
    cluster = subject.cluster
    words = [
        "srun",
        "--mpi=pmix",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--label",
        "python",
        "-m",
        "dynamo_mpi.worker",
        "--role",
        subject.role,
        "--model",
        model,
        "--engine-config",
        engine_config,
    ]
    return shlex.join(words)
