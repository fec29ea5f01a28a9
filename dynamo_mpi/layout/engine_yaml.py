# SPDX-License-Identifier: Apache-2.0
"""Writes the engine's YAML for a layout, and the command that starts its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.layout.engine_config import Transceiver
from dynamo_mpi.layout.format import short_name
from dynamo_mpi.layout.kv_cache import tokens_per_block
from dynamo_mpi.layout.yaml_line import yaml_line

if TYPE_CHECKING:
    from dynamo_mpi.layout.engine_config import EngineConfig
    from dynamo_mpi.layout.spec import LayoutSpec


LAYOUT_KEYS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "cp_config",
    "moe_tensor_parallel_size",
    "moe_expert_parallel_size",
    "moe_cluster_parallel_size",
    "enable_attention_dp",
    "enable_lm_head_tp_in_adp",
    "pp_partition",
    "gpus_per_node",
)
"""Keys that the layout decides, so that the planner writes them."""


def for_role(config: EngineConfig, role: str) -> EngineConfig:
    """Add the keys that a role requires (I6, I9), unless the user has set a transceiver or the scheduler."""
    missing: dict[str, Any] = {}
    if role == "prefill" and config.keys.get("disable_overlap_scheduler") is None:
        missing["disable_overlap_scheduler"] = True
        config = replace(config, disable_overlap_scheduler=True)
    if role in ("prefill", "decode") and config.transceiver is None:
        missing["cache_transceiver_config"] = {"backend": "UCX"}
        config = replace(config, transceiver=Transceiver("UCX"))
    return replace(config, keys={**missing, **config.keys, **missing})


def engine_yaml(subject: LayoutSpec, model: str) -> str:
    """Write the engine config of a layout: its sizes, the keys that its role requires, and all other keys of the original config.

    Args:
        subject: the worker.
        model: its name, for the comment.
    """
    head = f"# {sanitize(' '.join(model.split()))}: {short_name(subject)}, {subject.cluster}, role {subject.role}\n"
    return head + "".join(f"{key}: {yaml_line(value)}\n" for key, value in _keys(subject).items())


def _keys(subject: LayoutSpec) -> dict[str, object]:
    layout = subject.layout
    if subject.other_backend:
        return dict(for_role(subject.config, subject.role).keys)
    keys: dict[str, object] = {
        "tensor_parallel_size": layout.tp_size,
        "pipeline_parallel_size": layout.pp_size,
    }
    if subject.shape.experts is not None:
        keys["moe_expert_parallel_size"] = layout.moe_ep_size
    keys |= {"enable_attention_dp": layout.enable_attention_dp, "gpus_per_node": subject.cluster.gpus_per_node}
    rest = {key: value for key, value in for_role(subject.config, subject.role).keys.items() if key not in LAYOUT_KEYS}
    keys |= rest
    if layout.cp_size > 1:
        block = tokens_per_block(subject)
        cache = rest.get("kv_cache_config")
        keys["context_parallel_size"] = layout.cp_size
        keys["cp_config"] = {"cp_type": layout.cp_type, "tokens_per_block": block}
        keys["kv_cache_config"] = {**(cache if isinstance(cache, dict) else {}), "tokens_per_block": block}
    return keys


def srun_line(subject: LayoutSpec, model: str, engine_config: str) -> str:
    """Write the command that starts a worker's ranks on Slurm.

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
        "--engine",
        subject.engine,
        "--role",
        subject.role,
        "--model",
        model,
        "--engine-config",
        engine_config,
    ]
    return " ".join(map(shell_word, words))
