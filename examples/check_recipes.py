# SPDX-License-Identifier: Apache-2.0
"""Checks a folder of engine configs for one model in one process: milliseconds each, where a `dynamo-mpi check` for each would start Python.

    python examples/check_recipes.py MODEL FOLDER GPUS_PER_NODE [GPU]

Prints a line for each ``*.yaml`` below FOLDER: its path, the result, and the first error. A recipe takes as many nodes as its ranks
fill. The exit code is the worst of all: 0, 78 for a layout that can't work, 65 for keys that TensorRT-LLM refuses or a file that is no YAML;
64 for a folder without recipes, or wrong arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.layout import DynamoMpiError, Report, Severity, Worker, check, find_model


def result_of(report: Report) -> str:
    """Return a report in one line."""
    errors = [finding for finding in report.findings if finding.severity is Severity.ERROR]
    warnings = sum(finding.severity is Severity.WARNING for finding in report.findings)
    if errors:
        return f"{errors[0].rule}: {errors[0].message}"
    return f"ok, warnings: {warnings}" if warnings else "ok"


def main(model: str, folder: str, gpus_per_node: int, gpu: str | None = None) -> int:
    """Check every recipe; return the worst exit code."""
    try:
        files = find_model(model)
    except DynamoMpiError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    worker = Worker(nodes=None, gpus_per_node=gpus_per_node, gpu=gpu)
    recipes = sorted(Path(folder).rglob("*.yaml"))
    if not recipes:
        # a mistyped path must not look like a folder without mistakes
        print(
            f"no *.yaml below {folder}\n  expected: a folder with engine configs\n  fix:      correct FOLDER",
            file=sys.stderr,
        )
        return ExitCode.USAGE
    worst = 0
    for recipe in recipes:
        try:
            report = check(files, recipe, worker)
        except DynamoMpiError as problem:
            print(f"{recipe}: {problem.problem}")
            worst = max(worst, problem.exit_code)
            continue
        print(f"{recipe}: {result_of(report)}")
        worst = max(worst, report.exit_code)
    return worst


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or not sys.argv[3].isdecimal():
        print(__doc__, file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
