# SPDX-License-Identifier: Apache-2.0
"""Finds a deployment: etcd, frontend and workers from its run folder, or else from the environment, as for a worker."""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.credentials import SERVICES_FILE, clients_of, split_clients
from dynamo_mpi.common.display import sanitize, shell_word
from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError, RetryableError, UsageError
from dynamo_mpi.common.record_codec import read_fields
from dynamo_mpi.config.options import Option, run_dir_option, to_name, to_text
from dynamo_mpi.deploy.run_files import (
    DEPLOYMENT,
    ENDED,
    LOCK,
    foreign_names,
    is_run_dir,
    open_run_dir,
    read_object,
    read_services,
    services_problem,
)
from dynamo_mpi.deploy.step_commands import SERVICES
from dynamo_mpi.ops.run_dirs import NoRunDirError, find_run_dir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from dynamo_mpi.common.own_files import OwnFolder

_NAME_ETCD = (SERVICES_FILE, "ETCD_ENDPOINTS", "HEAD_NODE", "HEAD_NODE_IP")

# options of `status`, `wait` and `down`
RUN_DIR = run_dir_option(
    "the deployment's folder; by default that of this job, or the only ./dynamo_mpi-* in which one runs"
)
NAMESPACE = Option("namespace", ("--namespace",), (), None, to_name, "only workers of this Dynamo namespace")
MODEL = Option(
    "model", ("--model", "--served-model-name"), (), None, to_text, "only workers of the model with this served name"
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare ``--output``."""
    parser.add_argument("--output", choices=("text", "json"), default="text", help="of stdout (default: %(default)s)")


class LauncherKilledError(RetryableError):
    """The launcher of a deployment was killed, so its files are there and nothing follows requests."""

    def __init__(self, run_dir: Path | None) -> None:
        super().__init__(
            f"the launcher of the deployment in {run_dir} was killed",
            expected="a deployment with a running launcher",
            fix=f"dynamo-mpi down --run-dir {shell_word(run_dir or '')}, and start it again",
        )


class DamagedServicesError(ConfigFileError):
    """A run folder's ``services.json`` makes no sense, so what runs there can't be reached."""

    def __init__(self, run_dir: Path | None, problem: str) -> None:
        super().__init__(
            f"{run_dir}/{SERVICES} can't be used: {sanitize(problem, 200)}",
            expected="what the services write there",
            fix=f"end the deployment (dynamo-mpi down --run-dir {shell_word(run_dir or '')}); if none runs there, remove the file",
        )


@dataclass(frozen=True)
class ExpectedWorker:
    """One worker that `dynamo-mpi launch` has started, or will.

    Args:
        name: such as ``prefill-0``.
        role: its role.
        nodes: its nodes.
        ranks: number of ranks.
        launch: its launch name in the worker record.
        departed: when it ended on request, in seconds since 1970: it isn't restarted; None if it hasn't.
        restarts: its failures of the last hour that count for the limit of restarts.
        given_up: why it can't be started again, while others of its role serve; None if it can.
    """

    name: str
    role: str
    nodes: tuple[str, ...]
    ranks: int
    launch: str
    departed: float | None = None
    restarts: int = 0
    given_up: str | None = None


@dataclass(frozen=True)
class NodeNote:
    """What `launch` says about a node.

    Args:
        node: its name.
        state: of a spare: ``preparing``, ``ready``, ``used`` or ``failed``.
        reason: why it is left out or drained, or has failed as a spare, or the worker that uses it as a spare.
        time: since when, in seconds since 1970; None if it isn't known.
        worker: the worker that it was taken from.
    """

    node: str
    state: str = ""
    reason: str = ""
    time: float | None = None
    worker: str = ""


@dataclass(frozen=True)
class RunningLaunch:
    """A running `dynamo-mpi launch`, as ``deployment.json`` describes it.

    Args:
        workers: all its workers.
        job_id: Slurm's job id; empty without Slurm.
        host: the launcher's host.
        pid: the launcher's process id.
        steps: names of all steps that it may start.
        spares: its spare nodes.
        excluded: nodes that it has left out for the rest of the job.
        drained: its nodes that an administrator drains.
        max_restarts: how often it starts a worker again in an hour.
    """

    workers: tuple[ExpectedWorker, ...]
    job_id: str
    host: str
    pid: int
    steps: tuple[str, ...] = ()
    spares: tuple[NodeNote, ...] = ()
    excluded: tuple[NodeNote, ...] = ()
    drained: tuple[NodeNote, ...] = ()
    max_restarts: int = 0


@dataclass(frozen=True)
class DeploymentEnd:
    """The end of a folder's last deployment.

    Args:
        exit_code: the launcher's exit code.
        report: the launcher's report.
        time: seconds since 1970.
    """

    exit_code: int
    report: str
    time: float

    @property
    def problem(self) -> str:
        """The report on one line, without what it expects and how to fix it."""
        return " ".join(self.report.partition("\n  expected:")[0].split())


@dataclass(frozen=True, repr=False)
class Deployment:
    """A deployment, before its records are read from etcd.

    Args:
        run_dir: the folder; None if there is none.
        environ: has etcd's endpoints and our credentials; None if the folder's services aren't up.
        frontend: its URL; empty if it isn't known.
        launch: the running launch; None if none runs.
        end: the end of the last launch; None if one runs.
        was_used: whether a deployment was ever started in the folder.
        is_foreign: whether none will be started there: it would remove what isn't ours.
        services_problem: why the content of the folder's services.json can't be used; empty if it can, or couldn't be read.
    """

    run_dir: Path | None
    environ: Mapping[str, str] | None
    frontend: str = ""
    launch: RunningLaunch | None = None
    end: DeploymentEnd | None = None
    was_used: bool = True
    is_foreign: bool = False
    services_problem: str = ""

    @property
    def has_services(self) -> bool:
        """Whether a run folder names the services."""
        return self.run_dir is not None and self.environ is not None

    @property
    def is_missing(self) -> bool:
        """Whether a run folder is named that doesn't exist (yet), or is none."""
        return self.run_dir is not None and not (self.was_used and self.run_dir.is_dir())

    @property
    def expected(self) -> tuple[ExpectedWorker, ...]:
        """The workers that a running launch has started, or will."""
        return self.launch.workers if self.launch is not None else ()

    @property
    def launcher_is_dead(self) -> bool:
        """Whether the launcher was killed. On another host than its own that can't be checked, and the answer is no."""
        launch = self.launch
        if self.run_dir is None or launch is None or launch.host != os.uname().nodename:
            return False
        # check the process first: trying the lock of a running launcher could block one that starts
        return not os.path.exists(f"/proc/{launch.pid}") and _is_free(self.run_dir)


def find_deployment(run_dir: Path | None, environ: Mapping[str, str]) -> Deployment:
    """Find the deployment. Files that don't exist yet are no error.

    Args:
        run_dir: the user's choice of folder.
        environ: this process's environment.

    Raises:
        UsageError: several deployments could be meant, or ``DYN_MPI_SERVICES_FILE`` can't be read.
        AuthorizationError: the folder, or that file, is another user's.
        NoRunDirError: it is a file.
    """
    if run_dir is None:
        if any(environ.get(name) for name in _NAME_ETCD) and not environ.get("SLURM_JOB_ID"):
            return Deployment(None, clients_of(environ))
        found = find_run_dir(environ)
        if found is None or not found.is_dir():
            return Deployment(None, clients_of(environ))
        run_dir = found
    run_dir = Path(os.path.abspath(run_dir))
    try:
        with open_run_dir(run_dir) as folder:
            return _read_deployment(run_dir, folder, environ)
    except NotADirectoryError:
        raise NoRunDirError(run_dir) from None
    except OSError:  # it doesn't exist (yet), or its file system fails for a moment
        return Deployment(run_dir, None)


def _read_deployment(run_dir: Path, folder: OwnFolder, environ: Mapping[str, str]) -> Deployment:
    services, found_environ = read_services(folder), None
    if services is not None:
        own, _ = split_clients(environ)
        found_environ = own | services.environment
    launch = _read_launch(_read_or_empty(folder, DEPLOYMENT))
    # services that were started in the folder later belong to another deployment
    is_over = launch is None and found_environ is None
    end = _read_end(_read_or_empty(folder, ENDED)) if is_over else None
    url = "" if services is None else services.url
    problem = "" if services is not None else services_problem(folder)
    was_used, is_foreign = is_run_dir(folder), bool(foreign_names(folder))
    return Deployment(run_dir, found_environ, url, launch, end, was_used, is_foreign, problem)


def read_launch(run_dir: Path, folder: OwnFolder) -> RunningLaunch | None:
    """Read ``deployment.json``; None if no launch runs in the folder.

    Raises:
        UsageError: it makes no sense.
        OSError: the folder can't be read.
    """
    try:
        if (content := read_object(folder, DEPLOYMENT)) == {}:
            raise ValueError("it is empty")
    except ValueError as error:
        raise UsageError(
            f"{run_dir / DEPLOYMENT} can't be read ({error}), so what runs there isn't known",
            expected="what launch has written there",
            fix="look at squeue --steps, and end the steps with scancel",
        ) from None
    return None if content is None else _read_launch(content)


def _read_or_empty(folder: OwnFolder, name: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        return read_object(folder, name) or {}
    return {}


def _is_free(run_dir: Path) -> bool:
    """Return whether no process holds the lock. A process id isn't enough: it may be another one inside a container."""
    with contextlib.suppress(OSError, DynamoMpiError), open_run_dir(run_dir) as folder, contextlib.ExitStack() as stack:
        lock = folder.open(LOCK, os.O_RDONLY)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


def _read_launch(content: dict[str, Any]) -> RunningLaunch | None:
    if not content:
        return None
    workers = content.get("workers")
    found = [
        # an older launcher writes only the step
        read_fields(ExpectedWorker, {"launch": worker.get("step"), **worker}, [])
        for worker in (workers if isinstance(workers, list) else [])
        if isinstance(worker, dict)
    ]
    spares, excluded, drained = (_read_notes(content.get(name)) for name in ("spares", "excluded", "drained"))
    return read_fields(
        RunningLaunch, content, [], workers=tuple(found), spares=spares, excluded=excluded, drained=drained
    )


def _read_notes(content: object) -> tuple[NodeNote, ...]:
    entries = content if isinstance(content, list) else []
    return tuple(read_fields(NodeNote, entry, []) for entry in entries if isinstance(entry, dict))


def _read_end(content: dict[str, Any]) -> DeploymentEnd | None:
    try:
        end = read_fields(DeploymentEnd, content, [], needed=("time",), report=str(content.get("report") or ""))
    except ValueError:
        return None
    # a code that no process can exit with would wrap around, even to 0
    return end if 0 <= end.exit_code < 256 else DeploymentEnd(1, end.report, end.time)
