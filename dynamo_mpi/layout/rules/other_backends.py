# SPDX-License-Identifier: Apache-2.0
"""Engine backends other than PyTorch's, by their own keys; heads, experts, formats and memory are PyTorch's rules and aren't judged."""

from __future__ import annotations

from math import prod

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import AUTODEPLOY
from dynamo_mpi.layout.engine_reader import as_bool, as_int
from dynamo_mpi.layout.finding import error, info, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
_EXPERTS = ("moe_tensor_parallel_size", "moe_expert_parallel_size", "moe_cluster_parallel_size")


def check_not_judged(subject: LayoutSpec) -> Iterator[Finding]:
    """A16: another engine backend than PyTorch's isn't judged by PyTorch's rules."""
    if not subject.other_backend:
        return
    judged = "world_size and its own limits" if subject.config.backend == AUTODEPLOY else "the number of ranks"
    yield info(
        "A16",
        f"of backend {subject.config.backend} only {judged} can be checked, not heads, experts, formats and memory",
        found=f"backend {subject.config.backend}",
    )


def check_autodeploy_sizes(subject: LayoutSpec) -> Iterator[Finding]:
    """A16: AutoDeploy divides a model by ``world_size`` alone, and refuses other sizes (``_torch/auto_deploy/llm_args.py``)."""
    if subject.config.backend != AUTODEPLOY:
        return
    keys, refused = subject.config.keys, refused_sizes(subject.config.keys)
    if refused:
        # without GPUs given, the cluster is as large as world_size, which isn't set
        size = (
            subject.cluster.world_size
            if subject.cluster.world_size > 1
            else prod(as_int(keys.get(key)) or 1 for key in _PARALLEL)
        )
        yield error(
            "A16",
            "AutoDeploy takes world_size, and refuses sizes of parallelism",
            found=", ".join(f"{key}: {keys[key]}" for key in refused),
            expected="world_size alone",
            fix=f"leave {', '.join(refused)} out" + ("" if keys.get("world_size") else f", and set world_size: {size}"),
        )


def refused_sizes(keys: Mapping[str, object]) -> list[str]:
    """Return the keys of sizes that AutoDeploy refuses."""
    refused = [key for key in _PARALLEL if keys.get(key) is not None and as_int(keys[key]) != 1]
    refused += [key for key in _EXPERTS if keys.get(key) is not None and as_int(keys[key]) != -1]
    refused += [key for key in ("enable_attention_dp",) if as_bool(keys.get(key))]
    refused += [key for key in ("cp_config",) if keys.get(key)]
    return refused


def check_autodeploy_limits(subject: LayoutSpec) -> Iterator[Finding]:
    """A16: AutoDeploy's own limits: one beam; graphs and batches that fit. A warning before 1.3 (``_torch/auto_deploy/llm_args.py``)."""
    config = subject.config
    if config.backend != AUTODEPLOY:
        return
    say = warning if subject.older_than(1, 3) else error
    batch, graphs = config.max_batch_size, config.cuda_graph_max_batch_size
    if (config.max_beam_width or 1) > 1:
        yield say(
            "A16",
            "AutoDeploy has no beam search",
            found=f"max_beam_width {config.max_beam_width}",
            expected="max_beam_width 1",
            fix="leave max_beam_width out",
        )
    if batch is not None and config.max_num_tokens is not None and batch > config.max_num_tokens:
        yield say(
            "A16",
            "AutoDeploy refuses a max_batch_size above max_num_tokens",
            found=f"max_batch_size {batch}, max_num_tokens {config.max_num_tokens}",
            expected="max_batch_size <= max_num_tokens",
            fix=f"set max_batch_size: {config.max_num_tokens}",
        )
    if batch is not None and graphs is not None and graphs > batch:
        yield say(
            "A16",
            "AutoDeploy refuses CUDA graphs above max_batch_size",
            found=f"cuda_graph_config.max_batch_size {graphs}, max_batch_size {batch}",
            expected="cuda_graph_config.max_batch_size <= max_batch_size",
            fix=f"set cuda_graph_config: {{max_batch_size: {batch}}}",
        )


RULES = (check_not_judged, check_autodeploy_sizes, check_autodeploy_limits)
