# SPDX-License-Identifier: Apache-2.0
"""Show a start: every rank's phases, the slowest ranks, where it failed. As text, as a page, or as a trace for Perfetto.

Reads the files that workers have written with --timeline, or the run folder of `dynamo-mpi launch` or `local`, and then shows all workers of
the deployment and its services on one time axis. Without either, uses the folder of this job, or the only ./dynamo_mpi-* that has timelines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.cli.style import terminal_width, write_out
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.common.folder_walk import fix_for
from dynamo_mpi.common.own_files import write_own
from dynamo_mpi.config.options import add_options, resolve, run_dir_option
from dynamo_mpi.deploy.run_files import TIMELINES, open_run_dir
from dynamo_mpi.ops.run_dirs import open_used_run_dir, select_run_dirs
from dynamo_mpi.telemetry.startup_trace import read_traces
from dynamo_mpi.telemetry.timeline_page import page
from dynamo_mpi.telemetry.timeline_text import perfetto_trace, text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dynamo_mpi.common.own_files import OwnFolder
    from dynamo_mpi.telemetry.startup_trace import StartupTrace

RUN_DIR = run_dir_option(
    "the deployment's folder; by default that of this job, or the only ./dynamo_mpi-* that has timelines"
)
OUTPUTS = ("html", "trace", "text")
_BY_SUFFIX = {".html": "html", ".htm": "html", ".json": "trace"}
_ROLES = ("launch", "encode", "prefill", "decode", "agg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path, help="page or trace that a worker has written")
    add_options(parser, (RUN_DIR,))
    parser.add_argument("--output", choices=OUTPUTS, help="the format; by default from OUT's name, else text")
    parser.add_argument("-o", dest="out", metavar="OUT", type=Path, help="output file; by default stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: there is nothing to show, or OUT can't be written.
        ConfigFileError: a file is no timeline.
    """
    if arguments.files and arguments.run_dir:
        raise UsageError(
            "both files and --run-dir were given", expected="one of them", fix="omit the files, or --run-dir"
        )
    named: list[Path] = arguments.files
    starts = [start for path in named for start in read_traces(path)] if named else _starts_of(_run_dir(arguments))
    starts.sort(key=_place)
    out: Path | None = arguments.out
    kind = arguments.output or (_BY_SUFFIX.get(out.suffix, "text") if out else "text")
    content = _render(starts, kind)
    if out is None:
        write_out(content.rstrip("\n"))
        return 0
    try:
        write_own(out, content.encode(errors="replace"))
    except OSError as error:
        raise UsageError(
            f"{out} can't be written: {error.strerror}",
            expected="a file that this user can write",
            fix=fix_for(error, "check its folder and rights"),
        ) from None
    return 0


def _render(starts: Sequence[StartupTrace], kind: str) -> str:
    if kind == "html":
        return page(starts)
    if kind == "trace":
        return json.dumps(perfetto_trace(starts), separators=(",", ":")) + "\n"
    return text(starts, terminal_width()) + "\n"


def _place(start: StartupTrace) -> tuple[int, str, str, float]:
    """Order the groups: the services, then prefill before decode, then by number."""
    role = _ROLES.index(start.role) if start.role in _ROLES else len(_ROLES)
    stem, _, number = start.name.rpartition("-")
    return role, stem, f"{number:0>9}", start.origin


def _run_dir(arguments: argparse.Namespace) -> Path:
    values, _ = resolve((RUN_DIR,), vars(arguments), os.environ, {})
    if values["run_dir"] is not None:
        return Path(values["run_dir"])
    if job := os.environ.get("SLURM_JOB_ID"):
        return Path(f"dynamo_mpi-{job}")
    found = select_run_dirs(_has_timelines)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"no ./dynamo_mpi-* of {Path.cwd()} has timelines", expected="a file or a run folder", fix="--run-dir DIR"
        )
    raise UsageError(
        f"{len(found)} folders of {Path.cwd()} have timelines: {', '.join(sanitize(path.name) for path in found)}",
        expected="one of them",
        fix="--run-dir DIR",
    )


def _has_timelines(run_dir: OwnFolder) -> bool:
    with run_dir.subfolder(TIMELINES) as folder:
        return bool(folder.names())


def _starts_of(run_dir: Path) -> list[StartupTrace]:
    path = run_dir / TIMELINES
    try:
        with open_run_dir(run_dir) as parent, parent.subfolder(TIMELINES) as folder:
            names = [name for name in folder.names() if name.endswith(".html") or name == "launch.json"]
            files = [path / name for name in names if not name.startswith(".")]
            starts = [start for file in files for start in read_traces(file, folder)]
    except (FileNotFoundError, NotADirectoryError):
        starts = []
    except OSError as error:
        raise UsageError(
            f"{path} can't be read: {error.strerror}",
            expected="timelines that this user can read",
            fix=fix_for(error, "check its rights"),
        ) from None
    if not starts:
        with open_used_run_dir(Path(os.path.abspath(run_dir))):
            raise UsageError(
                f"there is no timeline in {path}",
                expected="a deployment of which a worker has become ready, or has failed after the preflight",
                fix="wait for it, or name the run folder: --run-dir DIR",
            )
    return starts
