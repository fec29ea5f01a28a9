# SPDX-License-Identifier: Apache-2.0
"""List all legal layouts of a model on N GPUs, best first, with the reasons, the YAML and the srun command.

A layout is better if it fits, has no HELIX that the engine doesn't document, keeps tensor parallelism inside a node, has no copies of the
KV cache, has fewer pipeline stages, and leaves more memory, in this order. --engine-config provides settings other than sizes: KV cache
type, max_seq_len and so on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.cli.worker_inputs import (
    add_worker_options,
    engine_layers,
    read_values,
    role_engine_config,
    worker_of,
)
from dynamo_mpi.common.errors import LayoutError, UsageError
from dynamo_mpi.config.options import Option, to_count
from dynamo_mpi.layout.format import listed
from dynamo_mpi.layout.library import plan
from dynamo_mpi.layout.report_text import describe_plans

if TYPE_CHECKING:
    import argparse

TAKES_DYNAMIC_FLAGS = True
GPUS = Option("gpus", ("--gpus",), (), None, to_count, "GPUs of the worker, all nodes together")
LIMIT = Option("limit", ("--limit",), (), 10, to_count, "layouts to show as text; JSON has them all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.set_defaults(options=add_worker_options(parser, GPUS, LIMIT))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    values = read_values(arguments, arguments.options)
    if values["gpus"] is None:
        raise UsageError("the number of GPUs was not given", expected="GPUs of the worker", fix="--gpus N")
    path = values["engine_config"] or role_engine_config(values)
    layers = engine_layers(values, path, arguments.dynamic_flags)
    report = plan(values["model"], values["gpus"], layers, worker_of(values))
    if not report.layouts:
        sizes = listed(report.workable_sizes())
        raise LayoutError(
            f"no layout of {report.model} uses {report.subject.cluster} to the full",
            expected="a number of GPUs that heads, experts and layers can be divided over",
            fix=f"give the worker {sizes} GPUs" if sizes else "check that config.json is the model's own",
        )
    if arguments.output == "json":
        write_out(json.dumps(report.as_json()))
    else:
        write_out(describe_plans(report, values["limit"]))
    return report.exit_code
