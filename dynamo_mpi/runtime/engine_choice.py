# SPDX-License-Identifier: Apache-2.0
"""Chooses the engine of a worker: whether it can start here, and what every rank builds."""

from __future__ import annotations

from importlib.util import find_spec

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.engines.spec import EngineSpec

if TYPE_CHECKING:
    from dynamo_mpi.checks.preflight import PreflightInputs
    from dynamo_mpi.config.worker import Settings


def check_engine_installed(settings: Settings) -> None:
    """Check that the engine can be started here, if it will be.

    Raises:
        UsageError: its package isn't installed.
    """
    if settings.engine != "trtllm" or settings.preflight_only or settings.only_stage:
        return
    if find_spec("dynamo") is None or find_spec("dynamo.trtllm") is None:
        raise UsageError(
            "Dynamo's TensorRT-LLM worker isn't installed: there is no dynamo.trtllm",
            expected="ai-dynamo beside TensorRT-LLM, as in NVIDIA's tensorrtllm-runtime container",
            fix="start the ranks in that container, or pip install ai-dynamo",
        )


def describe_read_ahead(settings: Settings, plan: PreflightInputs) -> str:
    """Return how the engine reads the model's files ahead by itself; empty if nothing is known of it.

    TensorRT-LLM's ``auto``, the default since it has the setting, reads ahead wherever it can, so nothing has to be set here.
    """
    if settings.engine != "trtllm":
        return ""
    if (policy := plan.config.keys.get("checkpoint_io_policy")) is not None:
        return f"TensorRT-LLM reads ahead as the engine config says (checkpoint_io_policy: {sanitize(str(policy))})"
    if plan.version is not None and plan.version.minor < (1, 3):
        return ""
    return "TensorRT-LLM reads ahead by itself (checkpoint_io_policy: auto)"


def engine_spec(settings: Settings, plan: PreflightInputs) -> EngineSpec:
    """Return the spec of the engine that every rank must build."""
    config = plan.config
    return EngineSpec(
        engine=settings.engine,
        model_dir=str(settings.model),
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        cp_size=config.cp_size,
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        max_seq_len=config.max_seq_len,
        tokens_per_block=config.kv_cache.tokens_per_block,
        role=settings.role,
        kv_network=settings.kv_network or "",
        kv_keep_seconds=settings.kv_keep_seconds,
        kv_pull_seconds=settings.kv_pull_timeout,
    )
