# SPDX-License-Identifier: Apache-2.0
"""Check whether TensorRT-LLM accepts a model in a layout, in milliseconds and without a GPU: prints the broken rule, the fix and legal
choices.

The same rules run in the ranks before anything is loaded. With --prefill-engine-config and --decode-engine-config both workers of a
disaggregated pair are checked, and whether they fit each other. Exit code 0 if there is no error.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.cli.worker_inputs import (
    add_worker_options,
    read_engine,
    read_model,
    read_values,
    read_version,
    role_engine_config,
)
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, to_count, to_path
from dynamo_mpi.layout.layout import Cluster
from dynamo_mpi.layout.report import Report, check_pair, check_worker
from dynamo_mpi.layout.report_text import describe_pair, describe_report
from dynamo_mpi.layout.spec import LayoutSpec

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from dynamo_mpi.layout.engine_config import EngineConfig

TAKES_DYNAMIC_FLAGS = True
NODES = Option("nodes", ("--nodes",), (), 1, to_count, "nodes of the worker")
PAIR = tuple(
    option
    for role in ("prefill", "decode")
    for option in (
        Option(
            f"{role}_engine_config",
            (f"--{role}-engine-config",),
            (f"{role.upper()}_ENGINE_CONFIG",),
            None,
            to_path,
            f"engine config of the {role} worker of a pair",
        ),
        Option(
            f"{role}_nodes",
            (f"--{role}-nodes",),
            (f"NUM_{role.upper()}_NODES",),
            1,
            to_count,
            f"nodes of a {role} worker",
        ),
    )
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.set_defaults(options=add_worker_options(parser, NODES, *PAIR))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    values = read_values(arguments, arguments.options)
    dynamic = arguments.dynamic_flags
    files = read_model(values)
    shape = files.shape()
    version = read_version(values)

    def judge(role: str, path: Path | None, nodes: int) -> Report:
        merged = read_engine(values, path, dynamic)
        cluster = _cluster(values, merged.config, nodes)
        subject = LayoutSpec(shape, merged.config, cluster, role, version, values["engine"], values["min_requests"])
        return check_worker(subject, merged.findings)

    result: Any
    pair = [values["prefill_engine_config"], values["decode_engine_config"]]
    single = arguments.role is not None or arguments.engine_config is not None
    asked = any((arguments.prefill_engine_config, arguments.decode_engine_config))
    if asked and (single or not all(pair)):
        raise UsageError(
            "the engine configs of a pair aren't complete, or flags of a single worker were given with them",
            needed="--prefill-engine-config and --decode-engine-config, without --engine-config and --role",
        )
    if asked or (all(pair) and not single and values["engine_config"] is None):
        result = check_pair(
            judge("prefill", pair[0], values["prefill_nodes"]), judge("decode", pair[1], values["decode_nodes"])
        )
        text = describe_pair(files.name, result)
    else:
        role, config, nodes = values["role"], values["engine_config"], values["nodes"]
        if config is None and role != "agg":
            config = values.get(f"{role}_engine_config") or role_engine_config(values)
            nodes = values.get(f"{role}_nodes", nodes) if arguments.nodes is None else nodes
        result = judge(role, config, nodes)
        text = describe_report(files.name, result)
    if arguments.output == "json":
        write_out(json.dumps(result.as_json()))
    else:
        write_out(text)
    return int(result.exit_code)


def _cluster(values: dict[str, Any], config: EngineConfig, nodes: int) -> Cluster:
    """Return the cluster from the flags; without them, the smallest that the layout needs."""
    gpus, world_size = values["gpus_per_node"] or config.gpus_per_node, config.world_size
    if gpus is None:
        if world_size % nodes:
            raise UsageError(
                f"{world_size} ranks can't be spread evenly over {nodes} nodes",
                needed="the number of GPUs of a node",
                fix="--gpus-per-node G",
            )
        gpus = world_size // nodes
    return Cluster(nodes, gpus, values["gpu"])
