# SPDX-License-Identifier: Apache-2.0
"""The engine config: TensorRT-LLM's YAML with its names; keys that rules and estimates use are typed."""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass, field, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_reader import ANY, EngineReader, as_int

if TYPE_CHECKING:
    from collections.abc import Mapping

# H4: TensorRT-LLM's defaults for keys that an engine config does not set (``BaseLlmArgs``, ``KvCacheConfig``)
DEFAULT_MAX_BATCH_SIZE = 2048
DEFAULT_MAX_NUM_TOKENS = 8192
DEFAULT_TOKENS_PER_BLOCK = 32
DEFAULT_FREE_GPU_MEMORY_FRACTION = 0.9
# limit for any world size: rules iterate over its stages and divisors
MAX_RANKS = 65_536
PYTORCH, AUTODEPLOY, TENSORRT = "pytorch", "_autodeploy", "tensorrt"
"""The engine's own backends (``backend``)."""


@dataclass(frozen=True)
class KvCache:
    """``kv_cache_config``. None means the engine's default.

    Args:
        dtype: type of keys and values; ``auto`` means the checkpoint's.
        tokens_per_block: tokens of a block.
        free_gpu_memory_fraction: of the memory that is free once the weights are loaded.
        max_tokens: cap of the cache.
        enable_block_reuse: blocks with the same content are shared.
        max_attention_window: tokens per layer, repeated over the layers.
        state_dtype: of a hybrid's states, ``mamba_ssm_cache_dtype``.
    """

    dtype: str = "auto"
    tokens_per_block: int | None = None
    free_gpu_memory_fraction: float | None = None
    max_tokens: int | None = None
    enable_block_reuse: bool = True
    max_attention_window: tuple[int, ...] | None = None
    state_dtype: str | None = None


@dataclass(frozen=True)
class Moe:
    """``moe_config`` and the expert load balancer (EPLB).

    Args:
        backend: name of the kernels.
        max_num_tokens: tokens that the workspace is made for.
        balancer_path: file with the balancer's settings.
        num_slots: expert slots over all ranks; None without a balancer, or where it doesn't say.
        balanced: whether there is a balancer.
        balancer_read: whether its settings are known; not if its file is missing.
        assignments: experts of each slot, by layer.
    """

    backend: str | None = None
    max_num_tokens: int | None = None
    balancer_path: str | None = None
    num_slots: int | None = None
    balanced: bool = False
    balancer_read: bool = True
    assignments: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Transceiver:
    """``cache_transceiver_config``: how KV travels between prefill and decode."""

    backend: str | None = None
    runtime: str | None = None
    max_tokens_in_buffer: int | None = None
    kv_transfer_timeout_ms: int | None = None


@dataclass(frozen=True)
class Speculative:
    """``speculative_config``."""

    decoding_type: str | None = None
    max_draft_len: int | None = None
    nextn_layers: int | None = None
    model: str | None = None


class ParallelSizes:
    """What an engine config and the layout that follows from it have in common."""

    tp_size: int
    pp_size: int
    cp_size: int

    @property
    def world_size(self) -> int:
        """A1: number of ranks that the layout needs."""
        return self.tp_size * self.pp_size * self.cp_size


@dataclass(frozen=True)
class EngineConfig(ParallelSizes):
    """The keys of an engine config that affect layout, capacity and the KV transfer between roles. None means the engine's default.

    Args:
        tp_size: ``tensor_parallel_size``.
        pp_size: ``pipeline_parallel_size``.
        cp_size: ``context_parallel_size``.
        enable_attention_dp: attention runs data-parallel over the tp ranks, so heads aren't split (C1).
        max_batch_size: requests in one step.
        max_num_tokens: tokens in one step.
        max_seq_len: prompt and output tokens of one request.
        moe_tp_size: ``moe_tensor_parallel_size``; None and -1 mean the same to the engine (A3).
        moe_ep_size: ``moe_expert_parallel_size``.
        moe_cluster_size: ``moe_cluster_parallel_size``.
        cp_type: ``cp_config.cp_type``, upper case.
        cp_tokens_per_block: ``cp_config.tokens_per_block``.
        enable_lm_head_tp_in_adp: slice the LM head of the speculative layers under attention DP.
        pp_partition: layers of each stage.
        gpus_per_node: GPUs of a node.
        max_beam_width: beams of a request.
        enable_chunked_prefill: a prompt may enter over several steps.
        disable_overlap_scheduler: the next step isn't prepared while one runs.
        attn_backend: attention kernels.
        kv_cache: ``kv_cache_config``.
        moe: ``moe_config``.
        transceiver: ``cache_transceiver_config``; None if it isn't set.
        speculative: ``speculative_config``; None if it isn't set.
        cuda_graph_batch_sizes: ``cuda_graph_config.batch_sizes``.
        cuda_graph_max_batch_size: ``cuda_graph_config.max_batch_size``.
        cuda_graph_padding: ``cuda_graph_config.enable_padding``.
        cuda_graphs: whether they are enabled.
        load_format: how weights are read.
        orchestrator: ``orchestrator_type``.
        lora_cuda_graph: ``lora_config.cuda_graph_specialize_lora``.
        adp_timeout_iters: ``attention_dp_config.timeout_iters``.
        adp_wait_iters: ``attention_dp_config.batching_wait_iters``.
        backend: `PYTORCH`, `AUTODEPLOY` or `TENSORRT`.
        keys: the whole config as a mapping, for rules about keys.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    enable_attention_dp: bool = False
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    moe_tp_size: int | None = None
    moe_ep_size: int | None = None
    moe_cluster_size: int | None = None
    cp_type: str | None = None
    cp_tokens_per_block: int | None = None
    enable_lm_head_tp_in_adp: bool = False
    pp_partition: tuple[int, ...] | None = None
    gpus_per_node: int | None = None
    max_beam_width: int | None = None
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    attn_backend: str | None = None
    kv_cache: KvCache = field(default_factory=KvCache)
    moe: Moe = field(default_factory=Moe)
    transceiver: Transceiver | None = None
    speculative: Speculative | None = None
    cuda_graph_batch_sizes: tuple[int, ...] | None = None
    cuda_graph_max_batch_size: int | None = None
    cuda_graph_padding: bool = False
    cuda_graphs: bool = True
    load_format: str | None = None
    orchestrator: str | None = None
    lora_cuda_graph: bool = False
    adp_timeout_iters: int | None = None
    adp_wait_iters: int | None = None
    backend: str = PYTORCH
    keys: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def type_engine_config(keys: Mapping[str, Any], path: str) -> EngineConfig:
    """Parse the keys that rules use.

    Args:
        keys: the config, with all layers merged (``engine_layers.py``).
        path: where it was found, for messages.

    Raises:
        ConfigFileError: one of the values has the wrong type or is out of every range.
    """
    top = EngineReader(keys, path)
    cp_config = top.section("cp_config")
    graphs = top.section("cuda_graph_config")
    balance = top.section("attention_dp_config")
    cp_type = cp_config.text("cp_type")
    backend = _backend(top)
    config = EngineConfig(
        tp_size=top.size("tensor_parallel_size", maximum=MAX_RANKS) or 1,
        pp_size=top.size("pipeline_parallel_size", maximum=MAX_RANKS) or 1,
        cp_size=top.size("context_parallel_size", maximum=MAX_RANKS) or 1,
        enable_attention_dp=top.switch("enable_attention_dp") or False,
        max_batch_size=top.size("max_batch_size"),
        max_num_tokens=top.size("max_num_tokens"),
        max_seq_len=top.size("max_seq_len"),
        moe_tp_size=_moe_size(top, "moe_tensor_parallel_size"),
        moe_ep_size=_moe_size(top, "moe_expert_parallel_size"),
        moe_cluster_size=_moe_size(top, "moe_cluster_parallel_size"),
        cp_type=None if cp_type is None else cp_type.upper(),
        cp_tokens_per_block=cp_config.size("tokens_per_block"),
        enable_lm_head_tp_in_adp=top.switch("enable_lm_head_tp_in_adp") or False,
        pp_partition=top.sizes("pp_partition", minimum=0),
        gpus_per_node=top.size("gpus_per_node", maximum=MAX_RANKS),
        max_beam_width=top.size("max_beam_width"),
        enable_chunked_prefill=top.switch("enable_chunked_prefill") or False,
        disable_overlap_scheduler=top.switch("disable_overlap_scheduler") or False,
        attn_backend=top.text("attn_backend"),
        kv_cache=_kv_cache(top.section("kv_cache_config")),
        moe=_moe(top.section("moe_config")),
        transceiver=_transceiver(top),
        speculative=_speculative(top),
        cuda_graph_batch_sizes=graphs.sizes("batch_sizes", minimum=ANY),
        cuda_graph_max_batch_size=graphs.positive("max_batch_size"),
        cuda_graph_padding=graphs.switch("enable_padding") or False,
        cuda_graphs=not ("cuda_graph_config" in keys and keys["cuda_graph_config"] is None),
        # the engine takes a number of its enumeration too; only names matter here
        load_format=None if isinstance(keys.get("load_format"), int) else top.text("load_format"),
        orchestrator=top.text("orchestrator_type"),
        lora_cuda_graph=top.section("lora_config").switch("cuda_graph_specialize_lora") or False,
        adp_timeout_iters=balance.size("timeout_iters", minimum=ANY),
        adp_wait_iters=balance.size("batching_wait_iters", minimum=ANY),
        backend=backend,
        keys=keys,
    )
    return _by_world_size(config, top) if backend == AUTODEPLOY else config


def _backend(top: EngineReader) -> str:
    said = (top.text("backend") or PYTORCH).lower()
    return {"trt": TENSORRT, TENSORRT: TENSORRT, AUTODEPLOY: AUTODEPLOY}.get(said, PYTORCH)


def _by_world_size(config: EngineConfig, top: EngineReader) -> EngineConfig:
    """A16: AutoDeploy divides by ``world_size`` alone."""
    return replace(
        config,
        tp_size=top.size("world_size", minimum=0, maximum=MAX_RANKS) or 1,
        pp_size=1,
        cp_size=1,
        cp_type=None,
        enable_attention_dp=False,
        moe_tp_size=None,
        moe_ep_size=None,
        moe_cluster_size=None,
        pp_partition=None,
    )


def _moe_size(top: EngineReader, key: str) -> int | None:
    """A3: -1 means the same as nothing."""
    return None if as_int(top.values.get(key)) == -1 else top.size(key, maximum=MAX_RANKS)


def _kv_cache(section: EngineReader) -> KvCache:
    reuse = section.switch("enable_block_reuse")
    return KvCache(
        dtype=(section.text("dtype") or "auto").lower(),
        tokens_per_block=section.size("tokens_per_block"),
        free_gpu_memory_fraction=section.number("free_gpu_memory_fraction"),
        max_tokens=section.positive("max_tokens"),
        enable_block_reuse=True if reuse is None else reuse,
        max_attention_window=section.sizes("max_attention_window", minimum=ANY),
        state_dtype=section.text("mamba_ssm_cache_dtype"),
    )


def _moe(section: EngineReader) -> Moe:
    found: dict[str, Any] = {"backend": section.text("backend"), "max_num_tokens": section.positive("max_num_tokens")}
    balancer = section.values.get("load_balancer")
    if isinstance(balancer, str):
        found |= {"balancer_path": balancer, "balanced": True, "balancer_read": False}
    elif balancer is not None:
        found |= read_balancer(section.section("load_balancer"))
    return Moe(**found)


def read_balancer(section: EngineReader) -> dict[str, Any]:
    """Read an expert load balancer's settings, from the config or from the file that it names.

    Raises:
        ConfigFileError: one of the values has the wrong type.
    """
    assignments = section.section("initial_global_assignments")
    return {
        "balanced": True,
        "balancer_read": True,
        "num_slots": section.size("num_slots"),
        "assignments": tuple(
            (int(layer), assignments.sizes(layer, minimum=0) or ())
            for layer in assignments.values
            if str(layer).isdecimal()
        ),
    }


def _transceiver(top: EngineReader) -> Transceiver | None:
    if not top.has("cache_transceiver_config"):
        return None
    section = top.section("cache_transceiver_config")
    return Transceiver(
        section.text("backend"),
        section.text("transceiver_runtime"),
        section.positive("max_tokens_in_buffer"),
        section.size("kv_transfer_timeout_ms", minimum=ANY),
    )


def _speculative(top: EngineReader) -> Speculative | None:
    if not top.has("speculative_config"):
        return None
    section = top.section("speculative_config")
    return Speculative(
        section.text("decoding_type"),
        section.size("max_draft_len", minimum=ANY),
        section.positive("num_nextn_predict_layers"),
        section.text("speculative_model") or section.text("speculative_model_dir"),
    )
