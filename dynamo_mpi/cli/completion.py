# SPDX-License-Identifier: Apache-2.0
"""Print a shell's completion script for dynamo-mpi: verbs, flags, their values and files.

It needs the package shtab (`pip install 'dynamo-mpi[cli]'`) where it is made, and nothing where it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.errors import UsageError

if TYPE_CHECKING:
    import argparse

SHELLS = ("bash", "zsh", "tcsh")
# flags whose values are paths
_PATHS = ("FILE", "FOLDER", "PATH", "DIR", "OUT", "YAML", "RUN_DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    try:
        import shtab
    except ImportError:
        raise UsageError(
            "shell completion needs the Python package shtab",
            expected="shtab where the script is made",
            fix="pip install 'dynamo-mpi[cli]', or pip install shtab",
        ) from None
    parser = whole_parser()
    for action in (action for one in _parsers(parser) for action in one._actions):
        if str(action.metavar or action.dest.upper()).endswith(_PATHS):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    write_out(shtab.complete(parser, shell=arguments.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser with every verb, which a start never makes: it would import all verbs."""
    from dynamo_mpi.cli.main import PROGRAM, VERBS, Parser

    parser = Parser(prog=PROGRAM)
    verbs = parser.add_subparsers(parser_class=Parser)
    for verb, summary in VERBS.items():
        importlib.import_module(f"dynamo_mpi.cli.{verb}").add_arguments(verbs.add_parser(verb, help=summary))
    return parser


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    import argparse

    below = [
        one
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for one in action.choices.values()
    ]
    return [parser, *below]
