# SPDX-License-Identifier: Apache-2.0
"""List all legal layouts of a model on N GPUs, best first, with the reasons, the YAML and the srun command.

A layout is better if it fits, keeps tensor parallelism inside a node, has no copies of the KV cache, has fewer pipeline stages, and leaves
more memory, in this order. --engine-config provides settings other than sizes: KV cache type, max_seq_len and so on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.cli.worker_inputs import (
    add_worker_options,
    read_engine,
    read_model,
    read_values,
    read_version,
    role_engine_config,
)
from dynamo_mpi.common.errors import ExitCode, LayoutError, UsageError
from dynamo_mpi.config.options import Option, to_count
from dynamo_mpi.layout.engine_yaml import for_role
from dynamo_mpi.layout.format import listed
from dynamo_mpi.layout.layout import cluster_for
from dynamo_mpi.layout.planner import plan, workable_sizes
from dynamo_mpi.layout.report import exit_code_of
from dynamo_mpi.layout.report_text import describe_plans, plans_as_json
from dynamo_mpi.layout.rules.registry import config_findings
from dynamo_mpi.layout.spec import LayoutSpec

if TYPE_CHECKING:
    import argparse

TAKES_DYNAMIC_FLAGS = True
_DEFAULT_GPUS_PER_NODE = 8
GPUS = Option("gpus", ("--gpus",), (), None, to_count, "GPUs of the worker, all nodes together")
LIMIT = Option("limit", ("--limit",), (), 10, to_count, "layouts to show as text; JSON has them all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.set_defaults(options=add_worker_options(parser, GPUS, LIMIT))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    values = read_values(arguments, arguments.options)
    if values["gpus"] is None:
        raise UsageError("the number of GPUs was not given", needed="GPUs of the worker", fix="--gpus N")
    per_node = values["gpus_per_node"] or _DEFAULT_GPUS_PER_NODE
    cluster = cluster_for(values["gpus"], per_node, values["gpu"])
    if cluster is None:
        raise UsageError(
            f"{values['gpus']} GPUs are not a whole number of nodes with {per_node} each",
            needed="equally many GPUs on each node",
            fix=f"--gpus {values['gpus'] // per_node * per_node}, or another --gpus-per-node",
        )
    files = read_model(values)
    merged = read_engine(values, values["engine_config"] or role_engine_config(values), arguments.dynamic_flags)
    subject = LayoutSpec(
        files.shape(),
        for_role(merged.config, values["role"]),
        cluster,
        values["role"],
        read_version(values),
        values["engine"],
        values["min_requests"],
    )
    # problems that no layout can solve are printed beside the plans
    general = (*merged.findings, *config_findings(subject))
    found = plan(subject)
    if not found:
        sizes = listed(workable_sizes(subject))
        raise LayoutError(
            f"no layout of {files.name} uses {cluster} to the full",
            needed="a number of GPUs that heads, experts and layers can be divided over",
            fix=f"give the worker {sizes} GPUs" if sizes else "check that config.json is the model's own",
        )
    if arguments.output == "json":
        write_out(json.dumps(plans_as_json(files.name, values["model"], subject, found, general)))
    else:
        write_out(describe_plans(files.name, values["model"], subject, found, general, values["limit"]))
    code = exit_code_of(general)
    nothing_fits = all(made.memory is not None and not made.memory.weights_fit for made in found)
    return ExitCode.ILLEGAL_LAYOUT if code is ExitCode.OK and nothing_fits else code
