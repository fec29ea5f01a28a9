# SPDX-License-Identifier: Apache-2.0
"""End a deployment that `dynamo-mpi launch` started, from any host that sees its run folder: requests in flight are finished first.

Where its launcher was killed, the steps that it left are cancelled. Exit code 0 when nothing of it runs any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import DeadlineError, UsageError
from dynamo_mpi.launch.srun import token_of
from dynamo_mpi.launch.steps import SlurmEndings
from dynamo_mpi.options import MAX_SECONDS, Option, add_options, resolve, to_path, to_seconds

if TYPE_CHECKING:
    import argparse

POLL_SECONDS = 0.5
RUN_DIR = Option(
    "run_dir",
    ("--run-dir",),
    ("DYN_MPI_RUN_DIR",),
    None,
    to_path,
    "the deployment's folder; by default that of this job, or the only ./dynamo_mpi-* in which one runs",
)
TIMEOUT = Option(
    "timeout", ("--timeout",), (), 180.0, to_seconds, f"seconds until everything has ended, up to {MAX_SECONDS:g}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("folder", nargs="?", metavar="RUN_DIR", help="the same as --run-dir")
    add_options(parser, (RUN_DIR, TIMEOUT))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        UsageError: it can't be told which deployment is meant.
        DeadlineError: it had not ended when the time was up.
    """
    given = {**vars(arguments), "run_dir": arguments.run_dir or arguments.folder}
    values, _ = resolve((RUN_DIR, TIMEOUT), given, os.environ, {})
    run_dir = Path(os.path.abspath(values["run_dir"] or _find()))
    if not run_dir.is_dir():
        raise UsageError(f"there is no folder {run_dir}", needed="the run folder of a deployment", fix="--run-dir DIR")
    description = run_dir / "deployment.json"
    if not description.exists():
        _say(f"nothing runs in {run_dir}")
        return 0
    content = _read(description)
    (run_dir / "stop").touch(mode=0o600)
    end = time.monotonic() + values["timeout"]
    while "deployment.json" in os.listdir(run_dir):
        if _launcher_is_dead(run_dir):
            _clean(run_dir, str(content.get("job_id", "")), end)
        elif time.monotonic() > end:
            raise DeadlineError(
                f"the deployment in {run_dir} has not ended after {values['timeout']:g} s",
                fix=f"look at its log, or scancel {content.get('job_id') or 'its job'}",
            )
        time.sleep(POLL_SECONDS)
    _say(f"ended: {run_dir}")
    return 0


def _find() -> Path:
    if job := os.environ.get("SLURM_JOB_ID"):
        return Path(f"dynamo_mpi-{job}")
    found = sorted(path.parent for path in Path().glob("dynamo_mpi-*/deployment.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"no deployment runs in a ./dynamo_mpi-* of {Path.cwd()}", needed="its folder", fix="--run-dir DIR"
        )
    raise UsageError(
        f"{len(found)} deployments run in folders of {Path.cwd()}: {', '.join(path.name for path in found)}",
        needed="one of them",
        fix="--run-dir DIR",
    )


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _launcher_is_dead(run_dir: Path) -> bool:
    """Tell whether nobody holds the folder's lock any more."""
    with contextlib.suppress(OSError), open(run_dir / "lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _clean(run_dir: Path, job_id: str, end: float) -> None:
    """Cancel what a launcher that was killed has left, and say that nothing runs any more."""
    if job_id:
        endings, ours = SlurmEndings(job_id), f"dynmpi-{token_of(run_dir)}-"
        while left := [step for step, name in endings.running().items() if name.startswith(ours)]:
            _say(f"cancelling {', '.join(left)}, which a launcher that was killed has left")
            endings.cancel_ids(left)
            if time.monotonic() > end:
                raise DeadlineError(f"steps {', '.join(left)} have not ended", fix=f"scancel {job_id}")
            time.sleep(POLL_SECONDS)
    for name in ("services.json", "stop", "deployment.json"):
        (run_dir / name).unlink(missing_ok=True)


def _say(text: str) -> None:
    print(f"dynamo-mpi down: {text}", file=sys.stderr, flush=True)
