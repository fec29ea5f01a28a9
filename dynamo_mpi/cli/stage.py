# SPDX-License-Identifier: Apache-2.0
"""Show the copies of models that workers with --stage have made on this node, or remove them. Copies that a worker uses or makes stay.

On all nodes of an allocation: srun --ntasks-per-node=1 dynamo-mpi stage --stage /local/scratch
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.common.process import host_name
from dynamo_mpi.config.options import Option, add_options, resolve, to_folder
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.manifest import StageError
from dynamo_mpi.stage.store import Store

if TYPE_CHECKING:
    import argparse

    from dynamo_mpi.stage.store import Entry

STAGE = Option("stage", ("--stage",), ("DYN_MPI_STAGE",), None, to_folder, "the folder that workers got by --stage")
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    add_options(parser, (STAGE,))
    parser.add_argument("--unstage", nargs="+", metavar="NAME", help=f"remove these copies, or {ALL}")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code: 75 if a copy stays because it is in use.

    Raises:
        UsageError: no folder is given, it can't be used, or has no such copy.
    """
    values, _ = resolve((STAGE,), vars(arguments), os.environ, {})
    if values["stage"] is None:
        raise UsageError("no folder was given", expected="the workers' folder", fix="--stage DIR, or DYN_MPI_STAGE=DIR")
    if not os.path.isdir(values["stage"]):
        raise UsageError(f"there is no folder {values['stage']} on {host_name()}", fix="correct --stage")
    try:
        store = Store(str(values["stage"]))
        kept = _unstage(store, arguments.unstage) if arguments.unstage else []
        entries = store.entries()
    except StageError as error:
        raise UsageError(str(error), fix="correct --stage, or the folder's rights") from None
    if arguments.output == "json":
        listed = [entry._asdict() for entry in entries]
        write_out(json.dumps({"host": host_name(), "folder": store.path, "free": store.free_bytes(), "copies": listed}))
    else:
        write_out("\n".join([_head(store, entries), *(_line(entry) for entry in entries)]))
        if kept:
            write_out(f"in use and kept: {', '.join(kept)}")
    return int(ExitCode.TEMPORARY if kept else ExitCode.OK)


def _unstage(store: Store, names: list[str]) -> list[str]:
    """Remove copies; return the names of those that are in use."""
    there = [entry.name for entry in store.entries()]
    if unknown := sorted(set(names) - {*there, ALL}):
        raise UsageError(
            f"there is no copy {', '.join(map(sanitize, unknown))} in {store.path}",
            expected=", ".join(there) or "a copy; there is none",
            fix="dynamo-mpi stage lists them",
        )
    return [name for name in there if (name in names or ALL in names) and not store.remove(name)]


def _head(store: Store, entries: list[Entry]) -> str:
    where = "memory" if store.in_memory else store.type or "disk"
    used = gib(sum(entry.size for entry in entries))
    return f"{host_name()}: {len(entries)} copies, {used}, in {store.path} ({where}, {gib(store.free_bytes())} free)"


def _line(entry: Entry) -> str:
    state = "in use" if entry.in_use else time.strftime("used %Y-%m-%d %H:%M", time.localtime(entry.used))
    if not entry.complete:
        state = "being made" if entry.in_use else "left by a worker that was killed"
    return f"  {sanitize(entry.name)}  {gib(entry.size)}  {state}{f', of {sanitize(entry.source)}' if entry.source else ''}"
