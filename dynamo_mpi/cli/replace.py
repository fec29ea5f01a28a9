# SPDX-License-Identifier: Apache-2.0
"""Take a node out of a running deployment, for maintenance: its worker drains, and starts again with a spare node in the node's place.

Where the role has a second worker, the first drains only while that one serves. Without a spare node it then isn't started again; without
both, the request is refused (64). The node is left out for the rest of the job. Exit code 0 when the worker serves again, 75 if the
launcher was killed or the deployment ended meanwhile, 124 after --timeout; `launch` then goes on with the request.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.options import Option, add_options, resolve
from dynamo_mpi.config.sources import MAX_SECONDS, to_seconds
from dynamo_mpi.ops.deployment import RUN_DIR, Deployment, LauncherKilledError, read_launch
from dynamo_mpi.ops.replace import is_requested, replace_node, require_replaceable
from dynamo_mpi.ops.run_dirs import choose_run_dir, open_used_run_dir

if TYPE_CHECKING:
    import argparse

TIMEOUT = Option(
    "timeout",
    ("--timeout",),
    (),
    1800.0,
    to_seconds,
    f"seconds until the worker serves again, its drain and load included, up to {MAX_SECONDS:g}",
)
OPTIONS = (RUN_DIR, TIMEOUT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("node", metavar="NODE", help="the node, by its name in Slurm or in the hostfile")
    add_options(parser, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: no deployment runs, it doesn't use the node, or nothing can take its place.
        AuthorizationError: its folder is another user's.
        RetryableError: the launcher was killed, or the deployment ended meanwhile.
        PhaseTimeoutError: the node is still in use after the time limit.
    """
    values, _ = resolve(OPTIONS, vars(arguments), os.environ, {})
    run_dir = choose_run_dir(values["run_dir"], os.environ, "its folder", "--run-dir DIR")
    with open_used_run_dir(run_dir) as folder:
        launch = read_launch(run_dir, folder)
        if launch is None:
            raise UsageError(
                f"no deployment runs in {run_dir}",
                expected="the run folder of a running launch",
                fix="--run-dir DIR",
            )
        if Deployment(run_dir, None, launch=launch).launcher_is_dead:
            raise LauncherKilledError(run_dir)
        if not is_requested(folder, arguments.node):
            require_replaceable(arguments.node, launch)
        outcome = replace_node(folder, run_dir, arguments.node, values["timeout"], _say)
    write_out(str(outcome))
    return 0


def _say(text: str) -> None:
    print(without_controls(f"dynamo-mpi replace: {text}"), file=sys.stderr, flush=True)
