# SPDX-License-Identifier: Apache-2.0
"""End a deployment that `dynamo-mpi launch` started, from any host that can read its run folder. Requests in flight are finished first.

If its launcher was killed, its remaining steps are cancelled. Workers that were started without `launch` are found by their records in
etcd: with --namespace or --model only matching ones, with a --run-dir that has its own services all of its workers. Each gets SIGTERM,
prefill first: by its process on this host, or by its Slurm step, which `launch` or --job JOB.STEP must have named. Exit code 0 if nothing of
it runs any longer, 124 if something still runs after --timeout.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.cli.style import write_out
from dynamo_mpi.common.display import shell_word, without_controls
from dynamo_mpi.common.errors import PhaseTimeoutError, UsageError
from dynamo_mpi.common.files import PREFIX as LOCAL_PREFIX
from dynamo_mpi.common.files import sweep
from dynamo_mpi.common.waiting import poll_until
from dynamo_mpi.config.options import Option, add_options, resolve
from dynamo_mpi.config.sources import MAX_SECONDS, to_seconds
from dynamo_mpi.deploy.node_health import kill_wait, lost_among
from dynamo_mpi.deploy.run_files import DEPLOYMENT, LOCK, STOP
from dynamo_mpi.deploy.step_commands import SERVICES
from dynamo_mpi.deploy.steps import REST_SECONDS, SlurmStepController, is_step_name
from dynamo_mpi.ops.deployment import MODEL, NAMESPACE, RUN_DIR, find_deployment, read_launch
from dynamo_mpi.ops.run_dirs import choose_run_dir, open_used_run_dir
from dynamo_mpi.ops.stop import WorkerSelector, stop_workers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from dynamo_mpi.common.own_files import OwnFolder
    from dynamo_mpi.ops.deployment import RunningLaunch

POLL_SECONDS = 0.5
# each takes more than a second where a node doesn't answer
_LOOKS = 4
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
    given = {**vars(arguments), "run_dir": arguments.folder if arguments.run_dir is None else arguments.run_dir}
    values, _ = resolve(OPTIONS, given, os.environ, {})
    if values["namespace"] or values["model"]:
        return _end_workers(values, dry_run=arguments.dry_run)
    named = values["run_dir"]
    if named is None and values["job"]:
        raise UsageError("--job alone doesn't select workers", expected="their etcd or their name", fix=_SAY_WHICH)
    run_dir = choose_run_dir(named, os.environ, "its folder, or whose workers are meant", _SAY_WHICH)
    with open_used_run_dir(run_dir) as folder:
        return _end(run_dir, folder, values, is_named=named is not None, dry_run=arguments.dry_run)


def _end(run_dir: Path, folder: OwnFolder, values: dict[str, Any], *, is_named: bool, dry_run: bool) -> int:
    names = folder.names()
    if values["job"] or (is_named and DEPLOYMENT not in names and SERVICES in names):
        return _end_workers(values, dry_run=dry_run)
    launch = read_launch(run_dir, folder)
    if launch is None:
        _say(f"nothing runs in {run_dir}")
        return 0
    if dry_run:
        write_out(f"the deployment in {run_dir}: {', '.join(w.name for w in launch.workers)}, and its services")
        return 0
    _end_deployment(run_dir, folder, launch, values["timeout"])
    if run_dir.name.startswith(LOCAL_PREFIX):
        sweep(run_dir.parent)  # a killed `local` can't remove its folder
    _say(f"ended: {run_dir}")
    return 0


def _end_workers(values: dict[str, Any], *, dry_run: bool) -> int:
    deployment = find_deployment(values["run_dir"], os.environ)
    selector = WorkerSelector(deployment, values["namespace"], values["model"], values["job"])
    if not dry_run:
        stop_workers(selector, values["timeout"], _say)
        _say("ended")
    elif methods := selector.methods():
        write_out("\n".join(map(str, methods)))
    else:
        _say("no such worker is there")
    return 0


def _end_deployment(run_dir: Path, folder: OwnFolder, launch: RunningLaunch, seconds: float) -> None:
    os.close(folder.open(STOP, os.O_WRONLY | os.O_CREAT))
    end = time.monotonic() + seconds

    def late() -> PhaseTimeoutError:
        return PhaseTimeoutError(
            f"the deployment in {run_dir} has not ended after {seconds:g} s",
            expected="an end within --timeout",
            fix=f"look at its log, or scancel {shell_word(launch.job_id) if launch.job_id else 'its job'}",
        )

    for _ in poll_until(end, POLL_SECONDS, late):
        if DEPLOYMENT not in folder.names():
            return
        with _lock_of_dead_launcher(folder) as held:
            if held:
                _clean(folder, launch, end)
                return


@contextlib.contextmanager
def _lock_of_dead_launcher(folder: OwnFolder) -> Iterator[bool]:
    """Hold the folder's lock if its launcher has ended, so that no other launch starts in it during the cleanup."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            lock = folder.open(LOCK, os.O_RDWR)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held


def _clean(folder: OwnFolder, launch: RunningLaunch, end: float) -> None:
    """Cancel the steps of a killed launcher, and remove the files of a running deployment."""
    if launch.job_id:
        _cancel(SlurmStepController(launch.job_id), set(filter(is_step_name, launch.steps)), launch.job_id, end)
    for name in (SERVICES, STOP, DEPLOYMENT):
        folder.remove(name)


def _cancel(step_controller: SlurmStepController, names: set[str], job_id: str, end: float) -> None:
    left, said, began = list[str](), list[str](), time.monotonic()
    looks: list[dict[str, frozenset[str]]] = []

    def late() -> PhaseTimeoutError:
        found = f"steps {', '.join(left)} have not ended" if left else f"Slurm doesn't list the steps of job {job_id}"
        return PhaseTimeoutError(
            found, expected="no step of this deployment, within --timeout", fix=f"scancel {shell_word(job_id)}"
        )

    for _ in poll_until(end, POLL_SECONDS, late):
        running = step_controller.running()
        left = [step for step, name in (running or {}).items() if name in names]
        if running is not None and not left:
            return
        if not left:
            continue
        if left != said:
            _say(f"cancelling {', '.join(left)}, which a killed launcher has left")
            said = left
        step_controller.cancel_ids(left)
        if time.monotonic() > began + kill_wait() + REST_SECONDS:
            # at several looks, as one connection may fail
            now = {step: frozenset(lost_among(step_controller.nodes_of(step))) for step in left}
            looks = [*looks, now][-_LOOKS:]
            lost = [frozenset.intersection(*(look.get(step, frozenset()) for look in looks)) for step in left]
            if len(looks) == _LOOKS and all(lost):
                nodes = ", ".join(sorted(frozenset().union(*lost)))
                _say(f"{', '.join(left)}: ended, but where {nodes} was lost; Slurm lists it until it gives the node up")
                return


def _say(text: str) -> None:
    print(without_controls(f"dynamo-mpi down: {text}"), file=sys.stderr, flush=True)
