# SPDX-License-Identifier: Apache-2.0
"""Will TensorRT-LLM take this model in this layout? Answered in milliseconds, without a GPU: the rule, the cure and the legal choices.

The same rules run in the ranks before anything is loaded. With --prefill-engine-config and --decode-engine-config both workers of a
disaggregated pair are checked, and what they are to each other. Exit code 0 when nothing is an error.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import paint
from dynamo_mpi.cli.worker_inputs import ROLE, add_worker_options, read_engine, read_model, read_values, read_version
from dynamo_mpi.errors import UsageError
from dynamo_mpi.options import Option, to_count, to_path
from dynamo_mpi.parallelism.check import Report, check_pair, check_worker
from dynamo_mpi.parallelism.layout import Cluster
from dynamo_mpi.parallelism.report_text import describe_pair, describe_report
from dynamo_mpi.parallelism.subject import Subject

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

TAKES_DYNAMIC_FLAGS = True
NODES = Option("nodes", ("--nodes",), (), 1, to_count, "nodes of the worker")
PAIR = tuple(
    option
    for role in ("prefill", "decode")
    for option in (
        Option(
            f"{role}_engine_config",
            (f"--{role}-engine-config",),
            (),
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
    parser.set_defaults(options=add_worker_options(parser, ROLE, NODES, *PAIR))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    values = read_values(arguments, arguments.options)
    dynamic = arguments.dynamic_flags
    files = read_model(values)
    shape = files.shape()
    version = read_version(values)

    def judge(role: str, path: Path | None, nodes: int) -> Report:
        merged = read_engine(values, path, dynamic)
        gpus = _gpus_per_node(values["gpus_per_node"], merged.config.gpus_per_node, merged.config.world_size, nodes)
        cluster = Cluster(nodes, gpus, values["gpu"])
        subject = Subject(shape, merged.config, cluster, role, version, values["engine"], values["min_requests"])
        return check_worker(subject, merged.findings)

    result: Any
    pair = [values["prefill_engine_config"], values["decode_engine_config"]]
    if any(pair):
        if not all(pair) or (values["engine_config"] is not None and arguments.engine_config is not None):
            raise UsageError(
                "the engine configs of a pair aren't complete, or one too many was given",
                needed="--prefill-engine-config and --decode-engine-config, without --engine-config",
            )
        result = check_pair(
            judge("prefill", pair[0], values["prefill_nodes"]), judge("decode", pair[1], values["decode_nodes"])
        )
        text = describe_pair(files.name, result)
    else:
        result = judge(values["role"], values["engine_config"], values["nodes"])
        text = describe_report(files.name, result)
    if arguments.output == "json":
        print(json.dumps(result.as_json()))
    else:
        print(paint(text, sys.stdout))
    return int(result.exit_code)


def _gpus_per_node(given: int | None, config: int | None, world_size: int, nodes: int) -> int:
    """Take what was said of a node's GPUs; without a word, what the layout needs."""
    if given is not None:
        return given
    if config is not None:
        return config
    if world_size % nodes:
        raise UsageError(
            f"{world_size} ranks can't be spread evenly over {nodes} nodes",
            needed="the number of GPUs of a node",
            fix="--gpus-per-node G",
        )
    return world_size // nodes
