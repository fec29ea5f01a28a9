# SPDX-License-Identifier: Apache-2.0
"""The order of a long help: options in groups, examples at the end. Only a command line that asks for help comes here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Groups = dict[str, tuple[str, ...]]
"""Titles, and the names of the options below each."""

EXAMPLES = "examples:\n"
ENGINE_CONFIG = ("engine_config", "override_engine_args", "trtllm_version", "min_requests")
SIZES = (
    *("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "enable_attention_dp"),
    *("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width", "free_gpu_memory_fraction", "load_format"),
)
WORKER: Groups = {
    "model and role": ("role", "engine", "model", "served_model_name"),
    "engine config": ENGINE_CONFIG,
    "sizes, where the engine config has none": SIZES,
    "GPUs": ("gpus_per_node", "gpu", "allow_no_gpu", "cpu_bind"),
    "registration": (
        "namespace",
        "component",
        "endpoint",
        "request_plane",
        "discovery_backend",
        "no_peer_check",
        "allow_unlike_card",
    ),
    "hardware checks": ("probe", "probe_strict", "probe_timeout", "probe_seconds", "probe_kv_seconds"),
    "time limits": ("world_timeout", "load_timeout", "warmup_timeout", "drain_timeout", "heartbeat_timeout"),
    "model and kernels on the nodes' disks": (
        "stage",
        "only_stage",
        "stage_timeout",
        "stage_readers",
        "stage_verify",
        "cache",
    ),
    "networks and KV transfer": (
        "liveness_network",
        "kv_network",
        "kv_transport",
        "kv_keep_seconds",
        "kv_pull_timeout",
    ),
    "what others can watch": (
        *("ready_file", "failure_dir", "log_dir", "metrics_file", "timeline", "runtime_system_port"),
        *("progress", "progress_interval"),
    ),
}
WORKER_EXAMPLES = (
    "srun --mpi=pmix -N2 --ntasks-per-node=8 python -m dynamo_mpi.worker --role decode --model /models/M --engine-config tp16.yaml",
    "mpirun -n 3 python -m dynamo_mpi.worker --engine reference --model smollm2 --tensor-parallel-size 3 --preflight-only",
)
# options that the usage can list
_FEW = 12


class Formatter(argparse.HelpFormatter):
    """argparse's formatter, but examples and lists stay as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if ":\n  " in part else fill(part, width, indent) for part in text.split("\n\n"))


def arrange(
    parser: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[str]],
    examples: Iterable[str],
    note: str = "",
    further: str = "",
) -> None:
    """Put a parser's options into groups, what no group names last, and examples behind them.

    Args:
        parser: all its options are declared.
        groups: titles, and the names (``dest``) of the options below each; a name that the parser doesn't have is passed over.
        examples: command lines.
        note: one paragraph before them.
        further: words of the usage that are no options.
    """
    rest, many = parser._optionals, len(parser._actions) > _FEW
    for title, names in groups.items():
        actions = [action for name in names for action in rest._group_actions if action.dest == name]
        if actions:
            group = parser.add_argument_group(title)
            group._group_actions.extend(actions)
            rest._group_actions[:] = [action for action in rest._group_actions if action not in actions]
    parser._action_groups.remove(rest)
    parser._action_groups.append(rest)
    rest.title = "other options" if groups else rest.title
    if many:
        words = [str(action.metavar) for action in parser._get_positional_actions()]
        parser.usage = " ".join(filter(None, ("%(prog)s [OPTIONS]", *words, further)))
    parser.formatter_class = Formatter
    parser.epilog = "\n\n".join(filter(None, (note, EXAMPLES + "\n".join(f"  {line}" for line in examples))))
