# SPDX-License-Identifier: Apache-2.0
"""Section J: do the weights fit on the GPUs, and is enough left for the KV cache? The engine finds out after the whole load."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo_mpi.parallelism.finding import error, info, warning
from dynamo_mpi.parallelism.layout import Cluster
from dynamo_mpi.parallelism.legal import divisors, legal_tp_sizes
from dynamo_mpi.parallelism.memory import estimate
from dynamo_mpi.parallelism.subject import Subject
from dynamo_mpi.parallelism.weights import missing_sizes
from dynamo_mpi.parallelism.wording import gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.parallelism.finding import Finding
    from dynamo_mpi.parallelism.memory import MemoryEstimate

_MAX_WORLD = 256  # larger worlds aren't proposed


def check_capacity(subject: Subject) -> Iterator[Finding]:
    """J: weights, activations and some KV cache fit on every rank, for as many requests of full length as the subject wants.
    Nothing where the kind of GPU isn't known."""
    if subject.cluster.gpu is None or not subject.layout.multiplies_out:
        return
    found = estimate(subject)
    if found is None:
        yield info(
            "J",
            "whether it fits can't be estimated",
            found=f"{subject.shape.name}: config.json doesn't say {', '.join(missing_sizes(subject.shape))}",
            fix="start with a small max_num_tokens, and read the engine's own report of its KV cache",
        )
    elif not found.weights_fit:
        yield _weights_too_large(subject, found)
    elif not found.cache_fits:
        yield _no_cache(subject, found)
    else:
        yield _capacity(subject, found, subject.min_requests)


def _weights_too_large(subject: Subject, found: MemoryEstimate) -> Finding:
    stage = max(found.stages, key=lambda stage: stage.weights_bytes)
    room = found.gpu_bytes or 0
    return error(
        "J",
        f"the weights don't fit: {gib(stage.weights_bytes)} on a GPU of {gib(room)}",
        found=f"{_ranks(found, stage.stage)}: {gib(stage.weights_bytes - room)} too much; {subject.layout} on {subject.cluster}",
        needed=f"weights of less than {gib(room)} per rank, and room for activations and KV cache",
        fix=_advice(subject),
    )


def _no_cache(subject: Subject, found: MemoryEstimate) -> Finding:
    stage = found.fullest
    return error(
        "J",
        f"nothing is left for the KV cache: about {gib(stage.fixed_bytes)} of {gib(found.gpu_bytes or 0)} is used without it",
        found=f"{_ranks(found, stage.stage)}: weights {gib(stage.weights_bytes)}, activations {gib(stage.activation_bytes)}, "
        f"workspace of experts {gib(stage.workspace_bytes)}, outside torch {gib(stage.outside_bytes)}",
        needed=f"room for a block of {found.tokens_per_block} tokens",
        fix=f"{_advice(subject)}, or lower max_num_tokens",
    )


def _capacity(subject: Subject, found: MemoryEstimate, min_requests: int) -> Finding:
    stage = found.fullest
    each = " in each rank's own cache" if found.dp_size > 1 else ""
    detail = (
        f"{_ranks(found, stage.stage)}: weights {gib(stage.weights_bytes)} of {gib(found.gpu_bytes or 0)}, "
        f"{stage.kv_bytes_per_token} bytes of KV per token"
    )
    if found.tokens is None:
        return info("J", "the weights fit, and no layer keeps tokens", found=detail)
    requests = found.full_length_requests
    if requests is not None and requests < min_requests:
        short = (
            f"only {requests} requests of {found.length} tokens fit"
            if requests
            else f"not one request of {found.length} tokens fits"
        )
        return warning(
            "J",
            f"{short}{each}: there is room for about {found.tokens} tokens",
            found=detail,
            needed=f"room for {min_requests} x {found.length} tokens",
            fix=f"set max_seq_len to at most {_longest(subject, found, min_requests)}, or {_cache_advice(subject)}",
        )
    amount = "" if requests is None else f", {requests} requests of {found.length}"
    return info("J", f"room for about {found.tokens} tokens{amount}{each}", found=detail)


def _longest(subject: Subject, found: MemoryEstimate, requests: int) -> int:
    """Return the greatest length at which ``requests`` of them fit; windows weigh more in shorter ones."""
    stage, layout = found.fullest, subject.layout
    space = int((stage.left_bytes or 0) * found.fraction) * (layout.cp_size if layout.is_helix else 1)
    low, high = 0, (found.tokens or 0) // max(1, requests)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stage.request_bytes(middle) * requests <= space else (low, middle - 1)
    return low


def _cache_advice(subject: Subject) -> str:
    return "kv_cache_config.dtype: fp8" if subject.config.kv_cache.dtype != "fp8" else "use more GPUs"


def _advice(subject: Subject) -> str:
    """Name the smallest larger layout that fits."""
    ways = []
    fitting = _first_fitting(_larger_tp(subject)) or _first_fitting(_larger_pp(subject))
    if fitting is not None:
        config = fitting.config
        size = (
            f"tensor_parallel_size: {config.tp_size}"
            if config.tp_size != subject.config.tp_size
            else f"pipeline_parallel_size: {config.pp_size}"
        )
        expert = f" and moe_expert_parallel_size: {config.moe_ep_size}" if (config.moe_ep_size or 1) > 1 else ""
        ways.append(f"set {size}{expert}, on {fitting.cluster}")
    if subject.shape.quantisation is None:
        ways.append("take a checkpoint in FP8 or NVFP4")
    return ", or ".join(ways) or "use GPUs with more memory"


def _first_fitting(candidates: Iterable[Subject]) -> Subject | None:
    for candidate in candidates:
        found = estimate(candidate)
        if found is not None and found.weights_fit and found.cache_fits:
            return candidate
    return None


def _larger_tp(subject: Subject) -> Iterator[Subject]:
    config, shape = subject.config, subject.shape
    if config.enable_attention_dp:
        sizes: Iterable[int] = divisors(shape.experts.count) if shape.experts is not None else ()
    else:
        sizes = legal_tp_sizes(shape, config.cp_size) or ()
    for size in sizes:
        if size > config.tp_size and size * config.pp_size * config.cp_size <= _MAX_WORLD:
            # experts that were divided by expert parallelism alone stay so
            whole = subject.layout.moe_ep_size > 1 or config.enable_attention_dp
            ep_size = size if whole and shape.experts is not None and shape.experts.count % size == 0 else None
            yield _with(subject, tp_size=size, moe_tp_size=None, moe_ep_size=ep_size)


def _larger_pp(subject: Subject) -> Iterator[Subject]:
    config, layers = subject.config, subject.shape.num_layers or 0
    for size in range(config.pp_size + 1, layers + 1):
        if size * config.tp_size * config.cp_size > _MAX_WORLD:
            return
        yield _with(subject, pp_size=size, pp_partition=None)


def _with(subject: Subject, **changes: int | None) -> Subject:
    config = replace(subject.config, **changes)  # type: ignore[arg-type]
    per_node = subject.cluster.gpus_per_node
    nodes = -(-config.world_size // per_node)
    cluster = Cluster(nodes, config.world_size if nodes == 1 else per_node, subject.cluster.gpu)
    return replace(subject, config=config, cluster=cluster)


def _ranks(found: MemoryEstimate, number: int) -> str:
    stage = found.stages[number]
    last = stage.first_rank + stage.ranks - 1
    ranks = f"rank {last}" if stage.ranks == 1 else f"ranks {stage.first_rank} to {last}"
    return ranks if len(found.stages) == 1 else f"stage {number} ({ranks})"


RULES = (check_capacity,)
