# SPDX-License-Identifier: Apache-2.0
"""A layout rule of your own beside this project's: reads a model config and an engine config, applies all rules and one more.

    python examples/own_layout_rule.py MODEL ENGINE_CONFIG NODES GPUS_PER_NODE

MODEL is a model folder, its config.json, or a hub id that is in the cache. The exit codes are those of `dynamo-mpi check`: 0, 78 for an
illegal layout, 65 and 66 for files that can't be used, 64 for wrong arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.layout.engine_layers import EngineLayers, merge
from dynamo_mpi.layout.finding import Finding, error
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_files import find_model
from dynamo_mpi.layout.report import check_worker
from dynamo_mpi.layout.report_text import describe_report


def check_tensor_parallel_in_node(spec: LayoutSpec) -> Iterator[Finding]:
    """X1: tensor parallelism stays inside a node: this cluster's network is too slow for its all-reduces."""
    tp_size, gpus = spec.layout.tp_size, spec.cluster.gpus_per_node
    if tp_size > gpus:
        yield error(
            "X1",
            "tensor parallelism goes over the network",
            found=f"tp_size {tp_size}, {gpus} GPUs in a node",
            expected="tp_size <= GPUs of a node",
            fix=f"set tensor_parallel_size to {gpus} or less, and pipeline_parallel_size for the other nodes",
        )


def main(model: str, engine_config: str, nodes: str, gpus_per_node: str) -> int:
    """Check one worker; return the exit code."""
    try:
        files = find_model(model, os.environ)
        merged = merge(EngineLayers(yaml_text=read_small_text(Path(engine_config)), yaml_path=engine_config))
        spec = LayoutSpec(files.shape(), merged.config, Cluster(int(nodes), int(gpus_per_node)))
    except OSError as problem:
        print(
            f"{engine_config} can't be read: {problem.strerror}\n  fix:      check its path and rights", file=sys.stderr
        )
        return ExitCode.DATA
    except DynamoMpiError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    # no suggestions: they would not know of X1
    report = check_worker(spec, [*merged.findings, *check_tensor_parallel_in_node(spec)], suggest=False)
    print(describe_report(files.name, report))
    return report.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 5 or not (sys.argv[3] + sys.argv[4]).isdecimal():
        print(__doc__, file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    sys.exit(main(*sys.argv[1:]))
