# SPDX-License-Identifier: Apache-2.0
"""Dynamo's flags and variables that set keys of the engine's config, as in ``dynamo.trtllm``."""

from __future__ import annotations

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.config.options import Option, to_fraction, to_path, to_role, to_size, to_switch, to_text
from dynamo_mpi.layout.gpus import GPUS, find_gpu
from dynamo_mpi.layout.layout import ROLES

if TYPE_CHECKING:
    from collections.abc import Mapping


def to_gpu(text: str) -> str:
    """Parse the name of a kind of GPU."""
    try:
        return find_gpu(text).name
    except UsageError as error:
        raise ValueError(error.expected) from None


def _size(name: str, *more: str) -> Option:
    flag = "--" + name.replace("_", "-")
    return Option(
        name, (flag, *more), (f"DYN_TRTLLM_{name.upper()}",), None, to_size, f"{name}, if the engine config has none"
    )


ROLE = Option(
    "role",
    ("--role", "--disaggregation-mode"),
    ("DYN_MPI_ROLE", "DYN_TRTLLM_DISAGGREGATION_MODE"),
    "agg",
    to_role,
    "this worker's role; encode needs TensorRT-LLM; prefill and decode use PREFILL_ENGINE_CONFIG or DECODE_ENGINE_CONFIG if neither "
    "--engine-config nor ENGINE_CONFIG is set",
    ROLES,
)
GPUS_PER_NODE = _size("gpus_per_node")
ENGINE_OPTIONS: tuple[Option, ...] = (
    Option(
        "engine_config",
        ("--engine-config", "--extra-engine-args"),
        ("ENGINE_CONFIG", "DYN_TRTLLM_EXTRA_ENGINE_ARGS"),
        None,
        to_path,
        "engine config: TensorRT-LLM's YAML; it takes precedence over the flags",
    ),
    Option(
        "override_engine_args",
        ("--override-engine-args",),
        ("DYN_TRTLLM_OVERRIDE_ENGINE_ARGS",),
        None,
        to_text,
        "JSON object that takes precedence over the engine config; or --trtllm.KEY.KEY VALUE flags",
    ),
    _size("tensor_parallel_size", "--tp-size"),
    _size("pipeline_parallel_size", "--pp-size"),
    _size("expert_parallel_size", "--ep-size"),
    Option(
        "enable_attention_dp",
        ("--enable-attention-dp",),
        ("DYN_TRTLLM_ENABLE_ATTENTION_DP",),
        None,
        to_switch,
        "attention is data-parallel",
        switch=True,
        negatable=True,
    ),
    _size("max_batch_size"),
    _size("max_num_tokens"),
    _size("max_seq_len"),
    _size("max_beam_width"),
    Option(
        "free_gpu_memory_fraction",
        ("--free-gpu-memory-fraction",),
        ("DYN_TRTLLM_FREE_GPU_MEMORY_FRACTION",),
        None,
        to_fraction,
        "share of the memory that is left after the weights, for the KV cache",
    ),
    Option(
        "load_format",
        ("--load-format",),
        ("DYN_TRTLLM_LOAD_FORMAT",),
        None,
        to_text,
        "how the engine loads weights, if the engine config doesn't set it",
    ),
    Option(
        "trtllm_version",
        ("--trtllm-version",),
        ("DYN_MPI_TRTLLM_VERSION",),
        None,
        to_text,
        "TensorRT-LLM's version, for rules that depend on it; the installed one by default",
    ),
)
GPU = Option("gpu", ("--gpu",), ("DYN_MPI_GPU",), None, to_gpu, f"kind of GPU: {', '.join(sorted(GPUS))}")
MIN_REQUESTS = Option(
    "min_requests",
    ("--min-requests",),
    ("DYN_MPI_MIN_REQUESTS",),
    1,
    to_size,
    "warn if fewer requests of full length fit into the KV cache",
)
_KEYS = {
    "expert_parallel_size": "moe_expert_parallel_size",
    "free_gpu_memory_fraction": "kv_cache_config.free_gpu_memory_fraction",
}
_NO_KEYS = ("engine_config", "override_engine_args", "trtllm_version")


def engine_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that were set, by the engine key's dotted path.

    Args:
        values: the options' values by name; None if not set.
    """
    names = [option.name for option in (*ENGINE_OPTIONS, GPUS_PER_NODE) if option.name not in _NO_KEYS]
    return {_KEYS.get(name, name): values[name] for name in names if values.get(name) is not None}
