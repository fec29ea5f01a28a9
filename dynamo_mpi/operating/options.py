# SPDX-License-Identifier: Apache-2.0
"""The options that `status`, `wait` and `down` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.options import Option, to_name, to_path, to_text

if TYPE_CHECKING:
    import argparse

RUN_DIR = Option(
    "run_dir",
    ("--run-dir",),
    ("DYN_MPI_RUN_DIR",),
    None,
    to_path,
    "the deployment's folder; by default that of this job, or the only ./dynamo_mpi-* in which one runs",
)
NAMESPACE = Option("namespace", ("--namespace",), (), None, to_name, "only workers of this Dynamo namespace")
MODEL = Option(
    "model", ("--model", "--served-model-name"), (), None, to_text, "only workers of the model with this served name"
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare ``--output``."""
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")
