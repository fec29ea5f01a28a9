# SPDX-License-Identifier: Apache-2.0
"""What on this machine stands between you and a worker? On a login node, a head node, or where ranks run:
srun --mpi=pmix -n1 dynamo-mpi doctor. Nothing is started and nothing changed.

Each thing is ok, a warning, an error (a worker would not start), or skipped, as it can't be looked at here. Exit code 0 without errors,
else the first error's.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.config.options import Option, add_options, resolve, to_path, to_seconds, to_switch, to_text
from dynamo_mpi.ops.doctor.context import Context
from dynamo_mpi.ops.doctor.examination import examine
from dynamo_mpi.ops.doctor.registry import SECTIONS, chosen

if TYPE_CHECKING:
    import argparse

    from dynamo_mpi.ops.doctor.context import Section

ONLY = Option(
    "only",
    ("--only",),
    (),
    None,
    to_text,
    f"sections with commas between: {', '.join(section.name for section in SECTIONS)}",
)
RUN_DIR = Option(
    "run_dir",
    ("--run-dir",),
    ("DYN_MPI_RUN_DIR",),
    None,
    to_path,
    "a deployment's folder: its etcd and NATS are asked, with its credentials",
)


def to_time(text: str) -> float:
    """Read a number of seconds that isn't 0."""
    if not (seconds := to_seconds(text)):
        raise ValueError("more than 0 seconds")
    return seconds


TIMEOUT = Option("timeout", ("--timeout",), (), 10.0, to_time, "seconds for everything")
WRITE = Option(
    "write",
    ("--write",),
    (),
    False,
    to_switch,
    "also try to write to etcd where workers write; the key is taken away at once",
    switch=True,
)


PROBE = Option(
    "probe",
    ("--probe",),
    (),
    False,
    to_switch,
    "also put the GPUs of this machine, and the way between them, to the test, for up to half a minute more; not beside a worker",
    switch=True,
)
OPTIONS = (ONLY, RUN_DIR, TIMEOUT, WRITE, PROBE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, OPTIONS)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        UsageError: a flag's value is none that it takes.
    """
    values, _ = resolve(OPTIONS, vars(arguments), os.environ, {})
    # what the probes take is not the checks' time
    further, figures = _probe() if values["probe"] else ((), {})
    context = Context.of(os.environ, values["timeout"], values["run_dir"], values["write"])
    report = examine(chosen(values["only"], further), context, socket.gethostname())
    write_out(json.dumps({**report.as_json(), **figures}) if arguments.output == "json" else report.as_text())
    return int(report.exit_code)


def _probe() -> tuple[tuple[Section, ...], dict[str, Any]]:
    """Run the probes, and return their section with what they have measured."""
    from dynamo_mpi.checks.local_check import check_this_host
    from dynamo_mpi.ops.doctor.probe import NAME, section_of

    here = check_this_host()
    return (section_of(here),), {NAME: here.figures}
