# SPDX-License-Identifier: Apache-2.0
"""Estimates the memory of a worker's GPUs from configs, before anything is loaded (section J).

Weights and the KV cache are computed as in the engine. Activations, workspaces and memory outside torch are rules of thumb, with an error
of some GiB per GPU, so a layout that just fits by estimate may fail, and the other way round.
"""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_config import DEFAULT_FREE_GPU_MEMORY_FRACTION
from dynamo_mpi.layout.gpus import find_gpu
from dynamo_mpi.layout.kv_cache import kv_bytes, kv_dtype_known, resolve_kv_dtype, state_bytes, tokens_per_block
from dynamo_mpi.layout.layer_weights import dtype_bytes, dtype_known
from dynamo_mpi.layout.overheads import (
    ExtraWeights,
    activation_bytes,
    extra_weights,
    outside_bytes,
    with_draft,
    workspace_bytes,
)
from dynamo_mpi.layout.weights import missing_sizes, stage_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.weights import StageWeights


@dataclass(frozen=True)
class StageMemory:
    """Memory of each rank of one pipeline stage, in bytes.

    Args:
        stage: its number.
        layers: transformer layers that it holds.
        first_rank: lowest rank of the stage.
        ranks: number of ranks.
        weights_bytes: weights of the model, with its encoders.
        encoder_bytes: those of encoders of other inputs than text.
        draft_bytes: weights of a draft model.
        adapter_bytes: device cache of LoRA adapters.
        activation_bytes: activations of the largest step.
        workspace_bytes: workspace for the exchange of tokens between experts.
        outside_bytes: NCCL, CUDA graphs and other memory outside torch.
        kv_bytes_per_token: keys and values of one token that the rank holds, in the layers that look back without limit.
        windows: tokens that the other attention layers look back, each with the bytes of one token there.
        state_bytes_per_request: states of a hybrid's layers, whatever the request's length.
        left_bytes: memory left for the KV cache, before the fraction; negative if too much is used; None without a kind of GPU.
        tokens: tokens that the stage can hold, if all requests are of full length; None without a kind of GPU, or where it holds none.
    """

    stage: int
    layers: int
    first_rank: int
    ranks: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    outside_bytes: int
    kv_bytes_per_token: int
    windows: tuple[tuple[int, int], ...] = ()
    state_bytes_per_request: int = 0
    encoder_bytes: int = 0
    draft_bytes: int = 0
    adapter_bytes: int = 0
    left_bytes: int | None = None
    tokens: int | None = None

    @property
    def fixed_bytes(self) -> int:
        """Memory without the KV cache."""
        return self.loaded_bytes + self.activation_bytes + self.workspace_bytes + self.outside_bytes

    @property
    def loaded_bytes(self) -> int:
        """What is loaded: the model, a draft model, adapters."""
        return self.weights_bytes + self.draft_bytes + self.adapter_bytes

    def request_bytes(self, length: int) -> int:
        """Bytes of one request of ``length`` tokens."""
        windowed = sum(min(length, window) * size for window, size in self.windows)
        return length * self.kv_bytes_per_token + windowed + self.state_bytes_per_request


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one worker.

    Args:
        stages: its pipeline stages.
        gpu: the kind of GPU; None if it isn't known.
        gpu_bytes: memory of one.
        length: tokens of a request of full length; None if neither config says.
        fraction: share of what is left that the KV cache takes.
        tokens_per_block: tokens of a block of it.
        dp_size: groups of ranks with requests of their own; more than one with attention DP.
        tokens: tokens that the cache of one such group holds: those of its fullest stage.
        full_length_requests: requests of full length among them.
        fullest_stage: the stage that decides.
        assumptions: values that the configs lack, and what is assumed instead.
        at_least: keys whose meaning isn't known here, or that ask for what can't be counted: weights and caches may be larger.
    """

    stages: tuple[StageMemory, ...]
    gpu: str | None
    gpu_bytes: int | None
    length: int | None
    fraction: float
    tokens_per_block: int
    dp_size: int
    tokens: int | None
    full_length_requests: int | None
    fullest_stage: int
    assumptions: tuple[str, ...] = ()
    at_least: tuple[str, ...] = ()

    @property
    def fullest(self) -> StageMemory:
        """The stage that decides."""
        return self.stages[self.fullest_stage]

    @property
    def fullest_rank(self) -> int:
        """The first of the ranks that decide."""
        return self.fullest.first_rank

    @property
    def weights_total_bytes(self) -> int:
        """Weights over all ranks, every copy counted."""
        return sum(stage.weights_bytes * stage.ranks for stage in self.stages)

    @property
    def weights_fit(self) -> bool:
        """Whether the weights alone fit. True if the kind of GPU isn't known."""
        return self.gpu_bytes is None or all(stage.loaded_bytes <= self.gpu_bytes for stage in self.stages)

    @property
    def cache_fits(self) -> bool:
        """Whether a block of KV cache fits too. True if the kind of GPU isn't known."""
        short = self.tokens is not None and self.tokens < self.tokens_per_block
        return not short and all(stage.left_bytes is None or stage.left_bytes > 0 for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether weights, activations and a block of KV cache fit. None if the kind of GPU isn't known."""
        return None if self.gpu_bytes is None else self.weights_fit and self.cache_fits

    @property
    def world_tokens(self) -> int | None:
        """Tokens that all groups of ranks hold together."""
        return None if self.tokens is None else self.tokens * self.dp_size

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data. With attention DP ``tokens`` are one rank's, and ``tokens_of_all_ranks`` those of all groups."""
        requests = None if self.full_length_requests is None else self.full_length_requests * self.dp_size
        return {
            "gpu": self.gpu,
            "gpu_bytes": self.gpu_bytes,
            "fullest_rank": self.fullest_rank,
            "fullest_stage": self.fullest_stage,
            "tokens": self.tokens,
            "tokens_of_all_ranks": self.world_tokens,
            "full_length": self.length,
            "full_length_requests": self.full_length_requests,
            "full_length_requests_of_all_ranks": requests,
            "dp_size": self.dp_size,
            "kv_cache_fraction": self.fraction,
            "weights_total_bytes": self.weights_total_bytes,
            "stages": [
                {**vars(stage), "windows": [{"tokens": t, "bytes_per_token": b} for t, b in stage.windows]}
                for stage in self.stages
            ],
            "assumptions": list(self.assumptions),
            "at_least": list(self.at_least),
        }


def estimate(subject: LayoutSpec, *, fraction: float | None = None) -> MemoryEstimate | None:
    """Estimate a worker's memory.

    Args:
        subject: the worker.
        fraction: share of what is left for the KV cache; None for the engine config's, or the engine's own 0.9.

    Returns:
        The estimate; None if the model's config lacks sizes (`missing_values`), if the layout is impossible (A2, F3), or for an engine
        backend that isn't PyTorch's. An encode worker holds encoders alone.

    Raises:
        UsageError: there is no such kind of GPU.
    """
    if subject.other_backend:
        return None
    if subject.role == "encode":
        return _of_encoders(subject)
    possible = subject.layout.multiplies_out and subject.layout.pp_size <= (subject.shape.num_layers or 0)
    weights = stage_weights(subject) if possible else None
    if weights is None:
        return None
    config, layout = subject.config, subject.layout
    gpu = None if subject.cluster.gpu is None else find_gpu(subject.cluster.gpu)
    if fraction is None:
        fraction = config.kv_cache.free_gpu_memory_fraction
    fraction = DEFAULT_FREE_GPU_MEMORY_FRACTION if fraction is None else min(1.0, max(0.0, fraction))
    length = config.max_seq_len or subject.shape.context_length
    block = tokens_per_block(subject)
    room = None if gpu is None else gpu.memory
    extra = extra_weights(subject)
    stages = tuple(_stages(subject, weights, extra, room, fraction, length, block))
    counted = [stage.tokens for stage in stages if stage.tokens is not None]
    tokens = min(counted, default=None)
    # without a kind of GPU, the stage that uses most memory
    fullest = min(stages, key=_room) if gpu is not None else max(stages, key=lambda stage: stage.fixed_bytes)
    return MemoryEstimate(
        stages=stages,
        gpu=None if gpu is None else gpu.name,
        gpu_bytes=room,
        length=length,
        fraction=fraction,
        tokens_per_block=block,
        dp_size=layout.dp_size,
        tokens=tokens,
        full_length_requests=None if tokens is None or not length else tokens // length,
        fullest_stage=fullest.stage,
        assumptions=tuple(_assumptions(subject)),
        at_least=tuple(dict.fromkeys((*subject.shape.inexact, *extra.uncounted))),
    )


def missing_values(subject: LayoutSpec) -> tuple[str, ...]:
    """Name the values that the model's config lacks for an estimate; empty if none is missing."""
    if subject.role != "encode":
        return missing_sizes(subject.shape)
    if not subject.shape.encoders:
        return ("vision_config or audio_config",)
    return tuple(name for encoder in subject.shape.encoders for name in encoder.missing)


def _of_encoders(subject: LayoutSpec) -> MemoryEstimate | None:
    """Estimate an encode worker's memory: encoders, whole on each rank, and no KV cache."""
    if missing_values(subject):
        return None
    layout = subject.layout
    gpu = None if subject.cluster.gpu is None else find_gpu(subject.cluster.gpu)
    encoders = sum(encoder.parameters or 0 for encoder in subject.shape.encoders) * dtype_bytes(subject.shape)
    stage = StageMemory(0, 0, 0, layout.world_size, encoders, 0, 0, outside_bytes(subject), 0, encoder_bytes=encoders)
    left = None if gpu is None else gpu.memory - stage.fixed_bytes
    return MemoryEstimate(
        stages=(replace(stage, left_bytes=left),),
        gpu=None if gpu is None else gpu.name,
        gpu_bytes=None if gpu is None else gpu.memory,
        length=None,
        fraction=0.0,
        tokens_per_block=0,
        dp_size=1,
        tokens=None,
        full_length_requests=None,
        fullest_stage=0,
        assumptions=("an encode worker holds encoders alone; their activations aren't counted",),
        at_least=subject.shape.inexact,
    )


def _room(stage: StageMemory) -> tuple[bool, float, int]:
    """Order stages by their remaining memory; one without attention has no tokens to count."""
    left = stage.left_bytes or 0
    return left > 0, float("inf") if stage.tokens is None else stage.tokens, left


def _stages(
    subject: LayoutSpec,
    weights: Iterable[StageWeights],
    extra: ExtraWeights,
    room: int | None,
    fraction: float,
    length: int | None,
    block: int,
) -> Iterator[StageMemory]:
    layout, limit = subject.layout, subject.config.kv_cache.max_tokens
    ranks = layout.tp_size * layout.cp_size
    activations, workspace, outside = activation_bytes(subject), workspace_bytes(subject), outside_bytes(subject)
    for held in weights:
        last = held.stage == layout.pp_size - 1
        unlimited, windows = kv_bytes(subject, held)
        if last:
            unlimited, windows = with_draft(subject, unlimited, windows)
        stage = StageMemory(
            stage=held.stage,
            layers=held.layers,
            first_rank=held.stage * ranks,
            ranks=ranks,
            weights_bytes=held.bytes + extra.encoders,
            activation_bytes=activations,
            workspace_bytes=workspace if held.elements.experts else 0,
            outside_bytes=outside,
            kv_bytes_per_token=unlimited,
            windows=windows,
            state_bytes_per_request=state_bytes(subject, held),
            encoder_bytes=extra.encoders,
            draft_bytes=extra.draft if last else 0,
            adapter_bytes=extra.adapters,
        )
        if room is None:
            yield stage
            continue
        left = room - stage.fixed_bytes
        tokens = _tokens(stage, max(0, int(left * fraction)), length)
        if tokens is not None:
            tokens = tokens // block * block
            tokens = tokens if limit is None else min(tokens, limit)
            # HELIX: each rank of a context-parallel group holds other tokens of a request
            tokens *= layout.cp_size if layout.is_helix else 1
        yield replace(stage, left_bytes=left, tokens=tokens)


def _tokens(stage: StageMemory, space: int, length: int | None) -> int | None:
    if length is None:
        size = stage.kv_bytes_per_token + sum(size for _, size in stage.windows)
        return space // size if size else None
    size = stage.request_bytes(length)
    return space * length // size if size else None


def _assumptions(subject: LayoutSpec) -> Iterable[str]:
    shape = subject.shape
    if not dtype_known(shape):
        yield "the model's config names no known dtype: 2 bytes for each element that isn't quantised"
    if not kv_dtype_known(subject):
        yield f"the KV cache's dtype {resolve_kv_dtype(subject)} isn't known: {dtype_bytes(shape)} bytes per element"
    if shape.quantisation is not None and not shape.quantisation.certain:
        yield "the checkpoint selects quantised modules in a way that isn't supported here: all of them, except the excluded ones"
    if shape.experts is not None and not shape.experts.per_token:
        yield "the model's config doesn't specify the number of experts per token: no workspace counted"
    if shape.context_length is None and subject.config.max_seq_len is None:
        yield "neither config specifies the longest request: windows not counted"
    if (
        shape.state_space is not None
        and shape.state_space.dtype is None
        and subject.config.kv_cache.state_dtype is None
    ):
        yield "states of a hybrid's layers are assumed to be float32"
