# SPDX-License-Identifier: Apache-2.0
"""Copy a model to a folder on nodes' disks ahead of a job, show the copies that are on this node, or remove them.

A MODEL is copied to this node, or to those that --nodes lists, by a step beside the job's others; a node that has it already feeds the
others. Copies that a worker uses or makes stay. The copies on all nodes: srun --ntasks-per-node=1 dynamo-mpi stage --stage /local/scratch
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import ExitCode, UsageError
from dynamo_mpi.common.process import host_name
from dynamo_mpi.config.options import Option, add_options, resolve, to_stage
from dynamo_mpi.deploy.hostlist import expand
from dynamo_mpi.deploy.launchers import staging_step, without_srun_input
from dynamo_mpi.deploy.settings import OPTIONS as LAUNCH_OPTIONS
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.ops.staged import describe, read_staged
from dynamo_mpi.stage.manifest import StageError
from dynamo_mpi.stage.site import AUTO, folder_to_use
from dynamo_mpi.stage.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


STAGE = Option(
    "stage",
    ("--stage",),
    ("DYN_MPI_STAGE",),
    AUTO,
    to_stage,
    "the folder that workers got by --stage; auto as for a worker",
)
OPTIONS = (STAGE, *(option for option in LAUNCH_OPTIONS if option.name in ("mpi", "srun_args", "python")))
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id of a model to copy")
    add_options(parser, OPTIONS)
    parser.add_argument("--nodes", metavar="LIST", help="nodes of the Slurm job to copy it to, as Slurm writes them")
    parser.add_argument("--dry-run", action="store_true", help="print the command that copies, don't run it")
    parser.add_argument("--unstage", nargs="+", metavar="NAME", help=f"remove these copies, or {ALL}")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code: 75 if a copy stays because it is in use. Doesn't return after starting to copy.

    Raises:
        UsageError: no folder is given, it can't be used, or has no such copy.
    """
    values, _ = resolve(OPTIONS, vars(arguments), os.environ, {})
    values["stage"] = folder_to_use(str(values["stage"]), os.environ)
    if arguments.model is not None and arguments.unstage:
        raise UsageError(
            f"MODEL and --unstage are given, {sanitize(arguments.model)} and {sanitize(' '.join(arguments.unstage))}",
            expected="a model to copy, or copies to remove",
            fix="two commands: dynamo-mpi stage --unstage NAME, then dynamo-mpi stage MODEL",
        )
    if arguments.model is not None:
        return _copy(_Copying(arguments.model, arguments.nodes, arguments.dry_run, values))
    if arguments.nodes is not None or arguments.dry_run:
        raise UsageError(
            "--nodes and --dry-run are for copying a model, and none was given",
            expected="a model",
            fix="dynamo-mpi stage MODEL --stage DIR --nodes LIST; copies on several nodes: srun dynamo-mpi stage",
        )
    return _show(str(values["stage"]), arguments.unstage or [], as_json=arguments.output == "json")


@dataclass(frozen=True)
class _Copying:
    """What to copy where.

    Args:
        model: folder or hub id.
        nodes: a list of nodes; None for this one.
        dry_run: only print the command.
        values: the settings, by name.
    """

    model: str
    nodes: str | None
    dry_run: bool
    values: Mapping[str, object]


def _copy(copying: _Copying) -> int:
    values = copying.values
    model = os.path.abspath(copying.model) if os.path.isdir(copying.model) else copying.model
    python = str(values["python"] or sys.executable)
    words = (python, "-m", "dynamo_mpi.worker", "--only-stage", "--model", model, "--stage", str(values["stage"]))
    if copying.nodes is None:
        # of an allocation's shell: there it would be refused, as one rank of several
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = Command("stage", "stage", (words,))
    else:
        nodes = expand(copying.nodes, "--nodes")
        job = os.environ.get("SLURM_JOB_ID", "")
        environ = without_srun_input(os.environ)
        command = staging_step(job or "JOB", nodes, str(values["mpi"]), _words(values["srun_args"]), words)
        if not job and not copying.dry_run:
            mpirun = f"mpirun --host {','.join(nodes)} --map-by ppr:1:node -n {len(nodes)}"
            raise UsageError(
                "this is no Slurm allocation: SLURM_JOB_ID isn't set",
                expected="a shell of the job that has these nodes",
                fix=f"run it there; without Slurm: {mpirun} {' '.join(words)}",
            )
    if copying.dry_run:
        write_out(command.shown())
        return int(ExitCode.OK)
    sys.stdout.flush()
    try:
        # its exit code and its signals are those of the step
        os.execvpe(command.words[0], command.words, {**environ, **command.environment})  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise UsageError(
            f"{command.words[0]} can't be run: {error.strerror}",
            expected="srun, which starts the step on the nodes",
            fix="run this on the host, with Slurm's commands on PATH",
        ) from None


def _words(value: object) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, tuple) else ()


def _show(folder: str, names: list[str], *, as_json: bool) -> int:
    """Remove copies, and show those that are left."""
    try:
        kept = _unstage(folder, names) if names else []
        staged = read_staged(folder)
    except FileNotFoundError:
        raise UsageError(
            f"there is no folder {folder} on {host_name()}",
            expected="a folder on a disk of this node, in which copies are kept",
            fix="correct --stage",
        ) from None
    except StageError as error:
        raise UsageError(
            str(error),
            expected="a folder of copies that only this user can write",
            fix="correct --stage, or the folder's rights",
        ) from None
    if as_json:
        listed = [entry._asdict() for entry in staged.entries]
        write_out(json.dumps({"host": host_name(), "folder": staged.path, "free": staged.free, "copies": listed}))
    else:
        write_out(
            "\n".join([f"{host_name()}: {staged.summary}", *(f"  {describe(entry)}" for entry in staged.entries)])
        )
        if kept:
            write_out(f"in use and kept: {', '.join(kept)}")
    return int(ExitCode.TEMPORARY if kept else ExitCode.OK)


def _unstage(folder: str, names: list[str]) -> list[str]:
    """Remove copies; return the names of those that are in use."""
    staged = read_staged(folder)
    there = [entry.name for entry in staged.entries]
    if unknown := sorted(set(names) - {*there, ALL}):
        raise UsageError(
            f"there is no copy {', '.join(map(sanitize, unknown))} in {staged.path}",
            expected=", ".join(there) or "a copy; there is none",
            fix="dynamo-mpi stage lists them",
        )
    if not there:
        return []
    with contextlib.closing(Store(folder)) as store:
        return [name for name in there if (name in names or ALL in names) and not store.remove(name)]
