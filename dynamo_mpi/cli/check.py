# SPDX-License-Identifier: Apache-2.0
"""Check whether TensorRT-LLM accepts a model in a layout, in milliseconds and without a GPU: prints the broken rule, the fix and legal
choices.

The same rules run in the ranks before anything is loaded. With --prefill-engine-config and --decode-engine-config both workers of a
disaggregated pair are checked, and whether they fit each other. With --trtllm-version all, one table over all known versions. Exit code 0
if there is no error; over versions, if there is none in any.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.cli.worker_inputs import (
    add_worker_options,
    engine_layers,
    read_model,
    read_values,
    role_engine_config,
    worker_of,
)
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, to_count, to_path_text
from dynamo_mpi.layout.library import check
from dynamo_mpi.layout.report import PairReport, Report, check_pair
from dynamo_mpi.layout.report_text import describe_pair, describe_report

if TYPE_CHECKING:
    import argparse

TAKES_DYNAMIC_FLAGS = True
ALL_VERSIONS = "all"
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
            to_path_text,
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
    pair = [values["prefill_engine_config"], values["decode_engine_config"]]
    single = arguments.role is not None or arguments.engine_config is not None
    asked = any((arguments.prefill_engine_config, arguments.decode_engine_config))
    if asked and (single or not all(pair)):
        raise UsageError(
            "the engine configs of a pair aren't complete, or flags of a single worker were given with them",
            expected="--prefill-engine-config and --decode-engine-config, without --engine-config and --role",
            fix="add the missing one of the two, or check one worker: --engine-config FILE --role ROLE",
        )
    as_pair = asked or (all(pair) and not single and values["engine_config"] is None)
    model = read_model(values)

    def judge(role: str, path: str | None, nodes: int, version: str | None) -> Report:
        layers = engine_layers(values, path, arguments.dynamic_flags)
        return check(model, layers, worker_of(values, role=role, nodes=nodes, trtllm_version=version))

    def judge_all(version: str | None) -> Report | PairReport:
        if as_pair:
            return check_pair(
                judge("prefill", pair[0], values["prefill_nodes"], version),
                judge("decode", pair[1], values["decode_nodes"], version),
            )
        role, config, nodes = values["role"], values["engine_config"], values["nodes"]
        if config is None and role != "agg":
            config = role_engine_config(values)
            nodes = values.get(f"{role}_nodes", nodes) if arguments.nodes is None else nodes
        return judge(role, config, nodes, version)

    if values["trtllm_version"] == ALL_VERSIONS:
        from dynamo_mpi.layout.versions_report import describe_versions, over_versions

        over = over_versions(judge_all)
        write_out(json.dumps(over.as_json()) if arguments.output == "json" else describe_versions(model.name, over))
        return int(over.exit_code)
    result = judge_all(values["trtllm_version"])
    if arguments.output == "json":
        write_out(json.dumps(result.as_json()))
    elif isinstance(result, PairReport):
        write_out(describe_pair(model.name, result))
    else:
        write_out(describe_report(model.name, result))
    return int(result.exit_code)
