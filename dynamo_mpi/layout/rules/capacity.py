# SPDX-License-Identifier: Apache-2.0
"""Section J: the weights must fit on the GPUs, with enough memory left for the KV cache. The engine notices only after the whole load."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted, gib
from dynamo_mpi.layout.layout import LayoutSpec
from dynamo_mpi.layout.memory import estimate, missing_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.memory import MemoryEstimate, StageMemory

_MAX_WORLD = 256  # larger worlds aren't proposed


def check_capacity(subject: LayoutSpec) -> Iterator[Finding]:
    """J: weights, activations and some KV cache fit on every rank, for as many requests of full length as the subject wants.
    No finding if the kind of GPU isn't known."""
    if subject.cluster.gpu is None:
        return
    found, missing = estimate(subject), missing_values(subject)
    if found is None and not missing:
        return  # A2 and F3 report the problem
    if found is None:
        yield info(
            "J",
            "whether it fits can't be estimated",
            found=f"{subject.shape.name}: config.json doesn't say, or this version doesn't know, {', '.join(missing)}",
            fix=""
            if subject.role == "encode"
            else "start with a small max_num_tokens, and read the engine's own report of its KV cache",
        )
    elif not found.weights_fit:
        yield _weights_too_large(subject, found)
    elif not found.cache_fits:
        yield _no_cache(subject, found)
    else:
        yield _capacity(subject, found, subject.min_requests)


def _weights_too_large(subject: LayoutSpec, found: MemoryEstimate) -> Finding:
    stage = max(found.stages, key=lambda stage: stage.loaded_bytes)
    room = found.gpu_bytes or 0
    return error(
        "J",
        f"the weights don't fit: {_at_least(found)}{gib(stage.loaded_bytes)} on a GPU of {gib(room)}",
        found=f"{_ranks(found, stage.stage)}: {gib(stage.loaded_bytes - room)} too much{_beside(stage)}; "
        f"{subject.layout} on {subject.cluster}",
        expected=f"weights of less than {gib(room)} per rank, and room for activations and KV cache",
        fix=_advice(subject),
    )


def _no_cache(subject: LayoutSpec, found: MemoryEstimate) -> Finding:
    stage, room = found.fullest, found.gpu_bytes or 0
    used = (
        f"{_ranks(found, stage.stage)}: {_loaded(found, stage)}, activations {gib(stage.activation_bytes)}, "
        f"workspace of experts {gib(stage.workspace_bytes)}, outside torch {gib(stage.outside_bytes)}"
    )
    needed = f"room for a block of {found.tokens_per_block} tokens"
    limit = subject.config.kv_cache.max_tokens
    if (stage.left_bytes or 0) > 0:
        keys = f"free_gpu_memory_fraction {found.fraction:g}" + ("" if limit is None else f", max_tokens {limit}")
        return warning(
            "J",
            f"kv_cache_config leaves no block to the KV cache, though {gib(stage.left_bytes or 0)} are free",
            found=f"{keys}; {used}",
            expected=needed,
            fix="raise kv_cache_config.free_gpu_memory_fraction and leave max_tokens out",
        )
    steps = stage.activation_bytes + stage.workspace_bytes
    first = "lower max_num_tokens" if steps > stage.loaded_bytes else f"{_advice(subject)}, or lower max_num_tokens"
    return warning(
        "J",
        f"by estimate nothing is left for the KV cache: about {gib(stage.fixed_bytes)} of {gib(room)} is used without it",
        found=used,
        expected=needed,
        fix=first,
    )


def _capacity(subject: LayoutSpec, found: MemoryEstimate, min_requests: int) -> Finding:
    stage = found.fullest
    each = " in each rank's own cache" if found.dp_size > 1 else ""
    detail = (
        f"{_ranks(found, stage.stage)}: {_loaded(found, stage)} of {gib(found.gpu_bytes or 0)}, "
        f"{stage.kv_bytes_per_token} bytes of KV per token{unknown_keys(found)}"
    )
    most = " at most" if found.at_least else " about"
    if found.tokens is None:
        held = "the encoders fit" if subject.role == "encode" else "the weights fit, and no layer keeps tokens"
        return info("J", held, found=detail)
    requests = found.full_length_requests
    if requests is not None and requests < min_requests:
        short = (
            f"only {counted(requests, 'request')} of {found.length} tokens {'fits' if requests == 1 else 'fit'}"
            if requests
            else f"not one request of {found.length} tokens fits"
        )
        return warning(
            "J",
            f"{short}{each}: there is room for{most} {found.tokens} tokens",
            found=detail,
            expected=f"room for {min_requests} x {found.length} tokens",
            fix=f"set max_seq_len to at most {_longest(subject, found, min_requests)}, or {_cache_advice(subject)}",
        )
    amount = "" if requests is None else f", {counted(requests, 'request')} of {found.length}"
    return info("J", f"room for{most} {found.tokens} tokens{amount}{each}", found=detail)


def _at_least(found: MemoryEstimate) -> str:
    return "at least " if found.at_least else ""


def _loaded(found: MemoryEstimate, stage: StageMemory) -> str:
    return f"weights {_at_least(found)}{gib(stage.weights_bytes)}{_beside(stage)}"


def _beside(stage: StageMemory) -> str:
    parts = (("draft model", stage.draft_bytes), ("adapters", stage.adapter_bytes))
    return "".join(f", {name} {gib(size)}" for name, size in parts if size)


def unknown_keys(found: MemoryEstimate) -> str:
    """Name the keys because of which a figure is only a lower bound; empty if there is none."""
    return f"; not counted: {', '.join(found.at_least)}" if found.at_least else ""


def _longest(subject: LayoutSpec, found: MemoryEstimate, requests: int) -> int:
    """Return the greatest length at which ``requests`` of them fit; windows weigh more in shorter ones."""
    stage, layout = found.fullest, subject.layout
    space = int((stage.left_bytes or 0) * found.fraction) * (layout.cp_size if layout.is_helix else 1)
    low, high = 0, (found.tokens or 0) // max(1, requests)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stage.request_bytes(middle) * requests <= space else (low, middle - 1)
    return low


def _cache_advice(subject: LayoutSpec) -> str:
    return "kv_cache_config.dtype: fp8" if subject.config.kv_cache.dtype != "fp8" else "use more GPUs"


def _advice(subject: LayoutSpec) -> str:
    smaller = "" if subject.shape.quantisation is not None else "take a checkpoint in FP8 or NVFP4, "
    return f"{smaller}divide it over more GPUs, or take GPUs with more memory"


def _ranks(found: MemoryEstimate, number: int) -> str:
    stage = found.stages[number]
    last = stage.first_rank + stage.ranks - 1
    ranks = f"rank {last}" if stage.ranks == 1 else f"ranks {stage.first_rank} to {last}"
    return ranks if len(found.stages) == 1 else f"stage {number} ({ranks})"


RULES = (check_capacity,)
