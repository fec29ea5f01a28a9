# SPDX-License-Identifier: Apache-2.0
"""End a deployment that `dynamo-mpi launch` started, from any host that can read its run folder. Requests in flight are finished first.

If its launcher was killed, its remaining steps are cancelled. Workers that were started without `launch` are found by their records in
etcd: with --namespace or --model only matching ones, with a --run-dir that has its own services all of its workers. Each gets SIGTERM,
prefill first: by its process on this host, or by its Slurm step. Exit code 0 if nothing of it runs any longer, 124 if something still runs
after --timeout.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.errors import AuthorizationError, PhaseTimeoutError, UsageError
from dynamo_mpi.common.record_codec import sanitize
from dynamo_mpi.config.options import Option, add_options, resolve
from dynamo_mpi.config.sources import MAX_SECONDS, to_seconds
from dynamo_mpi.deploy.steps import SlurmStepController
from dynamo_mpi.ops.deployment import MODEL, NAMESPACE, RUN_DIR, find_deployment, find_run_dir
from dynamo_mpi.ops.stop import WorkerSelector, stop_method_for, stop_workers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

POLL_SECONDS = 0.5
_SAY_WHICH = "--run-dir DIR; or --namespace NAME, --model NAME"
TIMEOUT = Option(
    "timeout", ("--timeout",), (), 300.0, to_seconds, f"seconds until everything has ended, up to {MAX_SECONDS:g}"
)


def to_job(text: str) -> str:
    """Read a Slurm job, or a step."""
    if not re.fullmatch(r"\d+(_\d+)?(\+\d+)?(\.\d+)?", text):
        raise ValueError("JOB or JOB.STEP, in numbers")
    return text


JOB = Option("job", ("--job",), (), None, to_job, "only workers of this Slurm job or step: JOB or JOB.STEP")
OPTIONS = (RUN_DIR, NAMESPACE, MODEL, JOB, TIMEOUT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.add_argument("folder", nargs="?", metavar="RUN_DIR", help="the same as --run-dir")
    add_options(parser, OPTIONS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be ended, and how")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; return the exit code.

    Raises:
        UsageError: the deployment is ambiguous or missing.
        AuthorizationError: its folder is another user's.
        PhaseTimeoutError: it had not ended within the time limit.
    """
    if arguments.folder and arguments.run_dir and arguments.folder != arguments.run_dir:
        raise UsageError(
            f"two folders are named: {arguments.folder}, and --run-dir {arguments.run_dir}",
            expected="one deployment to end",
            fix="leave one out",
        )
    given = {**vars(arguments), "run_dir": arguments.run_dir or arguments.folder}
    values, _ = resolve(OPTIONS, given, os.environ, {})
    if values["namespace"] or values["model"]:
        return _end_workers(values, dry_run=arguments.dry_run)
    named = values["run_dir"]
    if named is None and values["job"]:
        raise UsageError("--job alone doesn't select workers", expected="their etcd or their name", fix=_SAY_WHICH)
    run_dir = Path(os.path.abspath(named or _find()))
    try:
        return _end(run_dir, values, is_named=named is not None, dry_run=arguments.dry_run)
    except PermissionError:
        raise AuthorizationError(
            f"{run_dir} can't be used by this user",
            expected="a run folder of this user's",
            fix="ask the user who launched it",
        ) from None


def _end(run_dir: Path, values: dict[str, Any], *, is_named: bool, dry_run: bool) -> int:
    if not run_dir.is_dir():
        raise UsageError(
            f"there is no folder {run_dir}", expected="the run folder of a deployment", fix="--run-dir DIR"
        )
    description = run_dir / "deployment.json"
    if values["job"] or (is_named and not description.exists() and (run_dir / "services.json").exists()):
        return _end_workers(values, dry_run=dry_run)
    if not description.exists():
        _say(f"nothing runs in {run_dir}")
        return 0
    content = _read(description)
    if dry_run:
        names = [sanitize(str(worker.get("name"))) for worker in content.get("workers", ()) if isinstance(worker, dict)]
        write_out(f"the deployment in {run_dir}: {', '.join(names)}, and its services")
        return 0
    _end_deployment(run_dir, content, values["timeout"])
    _say(f"ended: {run_dir}")
    return 0


def _end_workers(values: dict[str, Any], *, dry_run: bool) -> int:
    deployment = find_deployment(values["run_dir"], os.environ)
    selector = WorkerSelector(deployment, values["namespace"], values["model"], values["job"])
    if not dry_run:
        stop_workers(selector, values["timeout"], _say)
        _say("ended")
    elif methods := [stop_method_for(worker) for worker in selector.workers()]:
        write_out("\n".join(map(str, methods)))
    else:
        _say("no such worker is there")
    return 0


def _end_deployment(run_dir: Path, content: dict[str, Any], seconds: float) -> None:
    (run_dir / "stop").touch(mode=0o600)
    end = time.monotonic() + seconds
    while "deployment.json" in os.listdir(run_dir):
        with _lock_of_dead_launcher(run_dir) as held:
            if held:
                _clean(run_dir, content, end)
                break
        if time.monotonic() > end:
            raise PhaseTimeoutError(
                f"the deployment in {run_dir} has not ended after {seconds:g} s",
                fix=f"look at its log, or scancel {content.get('job_id') or 'its job'}",
            )
        time.sleep(POLL_SECONDS)


def _find() -> Path:
    if (found := find_run_dir(os.environ)) is None:
        raise UsageError(
            f"no deployment runs in a ./dynamo_mpi-* of {Path.cwd()}",
            expected="its folder, or whose workers are meant",
            fix=_SAY_WHICH,
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(content, dict):
        raise _unreadable(path, "no JSON object")
    return content


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} can't be read ({why}), so what runs there isn't known",
        expected="what launch has written there",
        fix="look at squeue --steps, and end the steps with scancel",
    )


@contextlib.contextmanager
def _lock_of_dead_launcher(run_dir: Path) -> Iterator[bool]:
    """Hold the folder's lock if its launcher has ended, so that no other launch starts in it during the cleanup."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(run_dir / "lock", "rb+"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held


def _clean(run_dir: Path, content: dict[str, Any], end: float) -> None:
    """Cancel the steps of a killed launcher, and remove the files of a running deployment."""
    if job_id := str(content.get("job_id", "")):
        _cancel(SlurmStepController(job_id), set(content.get("steps", ())), job_id, end)
    for name in ("services.json", "stop", "deployment.json"):
        (run_dir / name).unlink(missing_ok=True)


def _cancel(step_controller: SlurmStepController, names: set[str], job_id: str, end: float) -> None:
    while True:
        running = step_controller.running()
        left = [step for step, name in (running or {}).items() if name in names]
        if running is not None and not left:
            return
        if left:
            _say(f"cancelling {', '.join(left)}, which a killed launcher has left")
            step_controller.cancel_ids(left)
        if time.monotonic() > end:
            found = (
                f"steps {', '.join(left)} have not ended" if left else f"Slurm doesn't list the steps of job {job_id}"
            )
            raise PhaseTimeoutError(found, fix=f"scancel {job_id}")
        time.sleep(POLL_SECONDS)


def _say(text: str) -> None:
    print(f"dynamo-mpi down: {text}", file=sys.stderr, flush=True)
