# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's layout rules, as far as the bootstrap applies them: world size, heads and layers.

Each rule carries its id and where the engine has it. The engine meets them minutes into a load, as a bare ``AssertionError`` on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.parallelism import heads
from dynamo_mpi.parallelism.finding import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.parallelism.engine_config import EngineConfig
    from dynamo_mpi.parallelism.model_shape import ModelShape


def check_layout(shape: ModelShape, config: EngineConfig, world_size: int) -> list[Finding]:
    """Apply every rule to one worker's layout.

    Args:
        shape: the model.
        config: the engine config.
        world_size: MPI ranks of the worker.

    Returns:
        What the rules have to say, in their order; empty when there is nothing.
    """
    rules: tuple[Callable[[ModelShape, EngineConfig, int], Finding | None], ...] = (
        check_world_size,
        check_attention_heads,
        check_kv_heads,
        check_layers,
    )
    return [finding for rule in rules if (finding := rule(shape, config, world_size)) is not None]


def check_world_size(shape: ModelShape, config: EngineConfig, world_size: int) -> Finding | None:
    """A1: the ranks are exactly ``tp * pp * cp`` (TensorRT-LLM, ``mapping.py: MappingBase.__init__``)."""
    needed = config.world_size
    if needed == world_size:
        return None
    product = f"tensor {config.tp_size} x pipeline {config.pp_size} x context {config.cp_size}"
    return Finding(
        "A1",
        Severity.ERROR,
        f"the layout needs {needed} ranks, but {world_size} were started",
        found=f"world size {world_size}; {product} = {needed}",
        needed="world_size = tensor_parallel_size x pipeline_parallel_size x context_parallel_size",
        fix=f"start {needed} ranks (srun --ntasks={needed}), or change the engine config to a product of {world_size}",
    )


def check_attention_heads(shape: ModelShape, config: EngineConfig, world_size: int) -> Finding | None:
    """B1, B2: query heads divide over tp x cp, or over cp alone with attention DP (``attention.py: Attention.__init__``,
    ``mla.py: MLA.__init__``)."""
    count = shape.attention_heads
    split = config.cp_size * (1 if config.enable_attention_dp else config.tp_size)
    if count is None or count % split == 0:
        return None
    over = "cp_size" if config.enable_attention_dp else "tp_size" if config.cp_size == 1 else "tp_size x cp_size"
    return Finding(
        "B2" if shape.latent_attention else "B1",
        Severity.ERROR,
        f"{count} attention heads can't be divided over {over} = {split}",
        found=f"{shape.name}: num_attention_heads {count}, {over} {split}, remainder {count % split}",
        needed=f"num_attention_heads % ({over}) == 0",
        fix=_legal_advice(shape, config),
    )


def check_kv_heads(shape: ModelShape, config: EngineConfig, world_size: int) -> Finding | None:
    """B3: KV heads divide over tp, or are replicated a whole number of times (``modeling_utils.py: duplicate_kv_weight``)."""
    kv_heads, tp_size = shape.kv_heads, config.tp_size
    if kv_heads is None or config.enable_attention_dp or heads.kv_heads_fit(kv_heads, tp_size):
        return None
    needed = "num_key_value_heads % tp_size == 0" if kv_heads >= tp_size else "tp_size % num_key_value_heads == 0"
    return Finding(
        "B3",
        Severity.ERROR,
        f"{kv_heads} KV heads can neither be divided over nor replicated to tp_size = {tp_size}",
        found=f"{shape.name}: num_key_value_heads {kv_heads}, tp_size {tp_size}",
        needed=needed,
        fix=_legal_advice(shape, config),
    )


def check_layers(shape: ModelShape, config: EngineConfig, world_size: int) -> Finding | None:
    """F3: there are at least as many layers as pipeline stages (``modeling_utils.DecoderModel.__pp_init__``)."""
    if shape.layers is None or shape.layers >= config.pp_size:
        return None
    return Finding(
        "F3",
        Severity.ERROR,
        f"{shape.layers} layers are not enough for pp_size = {config.pp_size}",
        found=f"{shape.name}: num_hidden_layers {shape.layers}, pp_size {config.pp_size}",
        needed="num_hidden_layers >= pp_size",
        fix=f"set pipeline_parallel_size to {shape.layers} or less",
    )


def legal_tp_sizes(shape: ModelShape, cp_size: int = 1) -> tuple[int, ...] | None:
    """B11 for a model (see `heads.legal_tp_sizes`); None when its config doesn't say how many heads there are."""
    if shape.attention_heads is None:
        return None
    return heads.legal_tp_sizes(shape.attention_heads, shape.kv_heads, cp_size)


def _legal_advice(shape: ModelShape, config: EngineConfig) -> str:
    legal = legal_tp_sizes(shape, config.cp_size)
    if not legal:
        return "choose a context_parallel_size that divides the heads"
    return f"set tensor_parallel_size to one of {', '.join(map(str, legal))} (B11)"
