# SPDX-License-Identifier: Apache-2.0
"""What the verbs' help has beside their flags: groups of options, and examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.config import help_text
from dynamo_mpi.config.help_text import ENGINE_CONFIG, SIZES, Groups

if TYPE_CHECKING:
    from argparse import ArgumentParser

NOTE = (
    "A flag takes precedence over its variable (env var), that over the default. Exit codes: docs/troubleshooting.md."
)

_OUTPUT: Groups = {"output": ("output", "verbose", "dry_run", "limit")}
_WHICH: Groups = {"which deployment": ("run_dir", "namespace", "model", "job")}
_RECIPE: Groups = {
    "model and role": ("model", "engine", "role"),
    "nodes and GPUs": ("nodes", "gpus", "gpus_per_node", "gpu"),
    "engine config": ENGINE_CONFIG,
    "a pair of workers": ("prefill_engine_config", "prefill_nodes", "decode_engine_config", "decode_nodes"),
    "sizes, where the engine config has none": SIZES,
    **_OUTPUT,
}
GROUPS: dict[str, Groups] = {
    "check": _RECIPE,
    "plan": _RECIPE,
    "local": {
        "model and ranks": ("role", "tp", "prefill_tp", "decode_tp", "model", "mpirun"),
        "what it does": ("ask", "max_tokens", "keep", "timeout"),
        "the engine": ("max_batch_size", "max_num_tokens", "max_seq_len"),
        "services": ("http_port", "request_plane", "credentials"),
        "output": ("timeline", "output", "verbose"),
    },
    "launch": {
        "model": ("role", "model", "served_model_name", "modality", "stage_dir", "cache_dir", "engine"),
        "aggregated workers (--role agg)": ("agg_engine_config", "agg_nodes", "agg_workers"),
        "prefill and decode workers (--role disagg)": (
            *("prefill_engine_config", "prefill_nodes", "prefill_workers"),
            *("decode_engine_config", "decode_nodes", "decode_workers"),
        ),
        "nodes and container": ("gpus_per_node", "image", "mounts", "run_dir", "python"),
        "launcher": ("launcher", "hostfile", "mpi", "srun_args", "mpirun"),
        "checks, time limits": ("skip_check", "kv_check", "start_timeout", "stop_timeout"),
        "failures": ("spare_nodes", "max_restarts"),
        **_OUTPUT,
    },
    "status": {**_WHICH, "output": ("watch", "output")},
    "wait": {**_WHICH, "what for": ("role", "frontend", "timeout"), **_OUTPUT},
    "replace": {"which deployment": ("run_dir",), "how": ("timeout",)},
    "down": {**_WHICH, "how": ("timeout", "dry_run")},
}
EXAMPLES: dict[str, tuple[str, ...]] = {
    "check": (
        "dynamo-mpi check --model DeepSeek-R1/config.json --tp-size 8 --ep-size 16 --gpus-per-node 8",
        "dynamo-mpi check --model M --engine-config tp8.yaml --nodes 1 --gpus-per-node 8 --gpu h200 --role decode",
        "dynamo-mpi check --model M --prefill-engine-config p.yaml --decode-engine-config d.yaml --decode-nodes 2 --gpus-per-node 8",
        "dynamo-mpi check --model M --engine-config tp8.yaml --trtllm-version all --output json",
    ),
    "plan": (
        "dynamo-mpi plan --model Llama-4-Maverick/config.json --gpus 16 --gpus-per-node 8 --gpu h200",
        "dynamo-mpi plan --model M --engine-config base.yaml --gpus 8 --role prefill --output json",
    ),
    "doctor": (
        "dynamo-mpi doctor",
        "srun --mpi=pmix -N2 --ntasks-per-node=1 dynamo-mpi doctor --only mpi,gpus",
        "dynamo-mpi doctor --run-dir dynamo_mpi-1234 --output json",
    ),
    "local": (
        'dynamo-mpi local --ask "What is the capital of France?"',
        "dynamo-mpi local --keep --http-port 8000",
        "dynamo-mpi local --role disagg --prefill-tp 3 --decode-tp 1",
    ),
    "launch": (
        "dynamo-mpi launch --dry-run --nodes n[1-4] --model M --prefill-engine-config p.yaml --decode-engine-config d.yaml",
        "dynamo-mpi launch --role agg --nodes 2 --model M --engine-config tp8.yaml --image dynamo.sqsh --mounts /models:/models",
        "dynamo-mpi launch --hostfile hosts --model M --prefill-engine-config p.yaml --decode-engine-config d.yaml",
        "dynamo-mpi launch --max-restarts 2 -- --publish-kv-events     (flags of every worker stand behind --)",
    ),
    "status": (
        "dynamo-mpi status --run-dir dynamo_mpi-1234 --watch",
        "ETCD_ENDPOINTS=http://head:2379 dynamo-mpi status --namespace dynamo --output json",
    ),
    "wait": (
        "dynamo-mpi wait --run-dir dynamo_mpi-1234 --timeout 1800 && run-the-benchmark",
        "dynamo-mpi wait --role prefill,decode --frontend http://head:8000",
    ),
    "timeline": (
        "dynamo-mpi timeline --run-dir dynamo_mpi-1234",
        "dynamo-mpi timeline --run-dir dynamo_mpi-1234 -o start.html",
    ),
    "stage": (
        "dynamo-mpi stage /shared/DeepSeek-R1 --stage /local/scratch --nodes n[1-4]",
        "dynamo-mpi stage --stage /local/scratch",
        "srun --ntasks-per-node=1 dynamo-mpi stage --stage /local/scratch --unstage all",
    ),
    "replace": ("dynamo-mpi replace n3", "dynamo-mpi replace n3 --run-dir dynamo_mpi-1234 --timeout 3600"),
    "down": ("dynamo-mpi down --run-dir dynamo_mpi-1234", "dynamo-mpi down --namespace dynamo --job 1234.5 --dry-run"),
    "completion": (
        "dynamo-mpi completion bash >~/.local/share/bash-completion/completions/dynamo-mpi",
        'eval "$(dynamo-mpi completion zsh)"',
    ),
}
PROGRAM_EXAMPLES = (
    'dynamo-mpi local --ask "What is the capital of France?"      try it on this machine',
    "dynamo-mpi check --model M --engine-config tp8.yaml           will it run?",
    "dynamo-mpi launch --dry-run …                                 the exact commands of a deployment",
    "dynamo-mpi VERB --help                                        all flags of a verb",
)


def arrange(parser: ArgumentParser, verb: str) -> None:
    """Put a verb's options into groups, with examples behind them."""
    further = "[-- FLAGS OF EVERY WORKER]" if verb == "launch" else ""
    help_text.arrange(parser, GROUPS.get(verb, {}), EXAMPLES[verb], NOTE, further)
