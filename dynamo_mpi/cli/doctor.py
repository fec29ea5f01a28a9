# SPDX-License-Identifier: Apache-2.0
"""Find problems of this machine that stop a worker. Run it on a login node, a head node, or as a rank:
srun --mpi=pmix -n1 dynamo-mpi doctor. It starts and changes nothing.

Each check is ok, a warning, an error (a worker would not start), or skipped, if it can't run here. Exit code 0 without errors,
otherwise the first error's.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.config.options import Option, add_options, resolve, run_dir_option, to_switch, to_text
from dynamo_mpi.config.sources import to_seconds
from dynamo_mpi.ops.doctor.check import Context
from dynamo_mpi.ops.doctor.runner import SECTIONS, chosen, run_sections

if TYPE_CHECKING:
    import argparse

    from dynamo_mpi.ops.doctor.check import Section

ONLY = Option(
    "only",
    ("--only",),
    (),
    None,
    to_text,
    f"sections, separated by commas: {', '.join(section.name for section in SECTIONS)}",
)
RUN_DIR = run_dir_option("a deployment's folder: its etcd and NATS are checked, with its credentials")


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
    "also write to etcd under the workers' prefixes; the keys are deleted at once",
    switch=True,
)


PROBE = Option(
    "probe",
    ("--probe",),
    (),
    False,
    to_switch,
    "also check the GPUs of this machine, and the links between them, for up to half a minute more; not while a worker runs",
    switch=True,
)
OPTIONS = (ONLY, RUN_DIR, TIMEOUT, WRITE, PROBE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, OPTIONS)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: a flag's value is invalid.
    """
    values, _ = resolve(OPTIONS, vars(arguments), os.environ, {})
    # the hardware checks don't count for the other checks' time limit
    further, figures = _probe() if values["probe"] else ((), {})
    context = Context.of(os.environ, values["timeout"], values["run_dir"], values["write"])
    report = run_sections(chosen(values["only"], further), context, socket.gethostname())
    write_out(json.dumps({**report.as_json(), **figures}) if arguments.output == "json" else report.as_text())
    return int(report.exit_code)


def _probe() -> tuple[tuple[Section, ...], dict[str, Any]]:
    """Run the hardware checks, and return their section with their figures."""
    from dynamo_mpi.checks.local_check import check_this_host
    from dynamo_mpi.ops.doctor.runner import HARDWARE_SECTION, section_of

    here = check_this_host()
    return (section_of(here),), {HARDWARE_SECTION: here.figures}
