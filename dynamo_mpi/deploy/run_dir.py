# SPDX-License-Identifier: Apache-2.0
"""The folder of one deployment, on a file system that all its nodes share. It holds credentials, so only its user may have access.

lock               held while the launcher runs; names its process
services.lock      the same for the services' process; removed when it ends
services/NAME.log  a service's output, of the last start in the folder
deployment.json    the workers and their nodes; removed when it ends
ended.json         how the last deployment here ended; removed when the next one starts
excluded.json      nodes that are left out for the rest of the job; kept, until a deployment of another job starts in the folder
services.json      the services' addresses and credentials (0600); removed when they end
ready/NAME.json    exists while a worker serves
timeline/NAME.html a worker's start as a page, NAME.trace.json for Perfetto; launch.json has the launcher's own steps; kept until a further
                   deployment starts in the folder, those of a worker's last starts before as NAME.1.html, NAME.2.html …
failures/NAME/     a worker's failure files; made when the first is written
spares/NODE.json   what a spare has of what a worker's preflight compares
logs/NAME.log      a step's output; kept, as NAME.log.old when a further deployment starts in the folder
stop               if it exists, the deployment ends
replace/NODE       if it exists, the worker on the node is moved to a spare, and the node is left out
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.display import shell_word
from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.deploy.excluded import read_excluded, write_excluded
from dynamo_mpi.deploy.run_files import (
    DEPLOYMENT,
    ENDED,
    EXCLUDED,
    LOCK,
    REPLACE,
    SERVICES_LOCK,
    STOP,
    TIMELINES,
    open_run_dir,
    read_services,
    unusable,
    write_object,
)
from dynamo_mpi.deploy.step_commands import SERVICES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.common.own_files import OwnFolder
    from dynamo_mpi.deploy.excluded import ExcludedNode
    from dynamo_mpi.deploy.run_files import ServiceAccess

ENDED_SCHEMA = 1
# limit of the report in ended.json: the logs have all of it
_LONGEST_REPORT = 8192
# of one worker
_KEPT_TIMELINES = 5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class _HeldFolder:
    """A run folder, created if it doesn't exist, and locked by this process until `close`.

    Args:
        path: the folder.
        lock: name of the lock file.
        held: the error and its fix if another process holds the lock.
        job_id: Slurm's job id, for the message of a process that finds it locked.
        warn: logs a warning if the file system has no locks.

    Raises:
        UsageError: it can't be created or used, others can write in it or replace it, or another process holds it.
        AuthorizationError: it is another user's.
    """

    def __init__(
        self,
        path: Path,
        lock: str,
        held: tuple[str, str],
        job_id: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path = path
        try:
            with contextlib.ExitStack() as stack:
                self._folder = stack.enter_context(open_run_dir(path, create=True))
                self._lock = _take_lock(self._folder, lock, held, warn)
                stack.callback(os.close, self._lock)
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id}
                os.write(self._lock, json.dumps(owner).encode())
                os.fsync(self._lock)  # other nodes recognise the folder by it
                self._prepare()
                stack.pop_all()
        except OSError as error:
            raise unusable(path, error.strerror) from None

    @property
    def services_file(self) -> Path:
        """The file with the services' addresses and credentials; it exists when they are ready."""
        return self.path / SERVICES

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)
        self._folder.close()

    def _prepare(self) -> None:
        """Create the folder's entries, and remove those of an earlier process."""


class ServicesDir(_HeldFolder):
    """The run folder in the services' process.

    Args:
        path: the folder; created if it doesn't exist.
        job_id: Slurm's job id, for the message of a process that finds it locked.
        warn: logs a warning.

    Raises:
        UsageError: as for `RunDir`.
    """

    def __init__(self, path: Path, job_id: str | None, warn: Callable[[str], None]) -> None:
        held = ("another services process has the job's folder", "stop that one, or take another --run-dir")
        super().__init__(path, SERVICES_LOCK, held, job_id, warn)

    def new_log(self, name: str) -> Path:
        """Return an empty file for a service's output, which only this user can read."""
        with self._folder.subfolder("services") as logs:
            descriptor = logs.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.fchmod(descriptor, 0o600)
            os.close(descriptor)
        return self.path / "services" / f"{name}.log"

    def publish(self, content: Mapping[str, Any]) -> None:
        """Write ``services.json``."""
        write_object(self._folder, SERVICES, content)

    def retract(self) -> None:
        """Remove ``services.json``. Idempotent."""
        self._folder.remove(SERVICES)

    def close(self) -> None:
        """Remove ``services.json``, and release the folder."""
        self.retract()
        self._folder.remove(SERVICES_LOCK)
        super().close()

    def _prepare(self) -> None:
        self._folder.subfolder("services", create=True).close()
        self.retract()


class RunDir(_HeldFolder):
    """The run folder in the deployment's launcher.

    Args:
        path: the folder; created if it doesn't exist.

    Raises:
        UsageError, AuthorizationError: as for `ServicesDir`.
    """

    def __init__(self, path: Path) -> None:
        self.logs = path / "logs"
        fix = f"another --run-dir, or end that one: dynamo-mpi down --run-dir {shell_word(path)}"
        super().__init__(path, LOCK, ("another deployment runs in", fix))

    def log(self, name: str) -> Path:
        """Return the log file of a step."""
        return self.logs / f"{name}.log"

    def ready_file(self, name: str) -> Path:
        """Return the path of a worker's ready file."""
        return self.path / "ready" / f"{name}.json"

    def failures(self, name: str) -> Path:
        """Return the folder of a worker's failure files."""
        return self.path / "failures" / name

    @property
    def milestones(self) -> Path:
        """The file with the durations of the launcher's own steps."""
        return self.path / TIMELINES / "launch.json"

    def services(self) -> ServiceAccess | None:
        """Return the content of ``services.json``; None if it doesn't exist yet."""
        return read_services(self._folder)

    def is_ready(self, name: str) -> bool:
        """Return whether a worker serves."""
        with contextlib.suppress(OSError), self._folder.subfolder("ready") as ready:
            return f"{name}.json" in ready.names()
        return False

    def remove_ready_file(self, name: str) -> None:
        """Remove a worker's ready file, if an earlier start has left one."""
        with self._folder.subfolder("ready") as ready:
            ready.remove(f"{name}.json")

    def stop_requested(self) -> bool:
        """Return whether the end was requested."""
        return STOP in _names(self._folder)

    def describe(self, content: Mapping[str, Any]) -> None:
        """Write ``deployment.json``, for the operator's commands."""
        write_object(self._folder, DEPLOYMENT, content)

    def take_replace_requests(self) -> list[str]:
        """Return the nodes that were requested to be replaced, and remove the requests."""
        if REPLACE not in _names(self._folder):
            return []
        with contextlib.suppress(OSError), self._folder.subfolder(REPLACE) as folder:
            nodes = sorted(name for name in folder.names() if not name.startswith("."))
            for node in nodes:
                folder.remove(node)
            return nodes
        return []

    def timeline(self, name: str, number: int = 0) -> Path:
        """Return the page of a worker's timeline.

        Args:
            name: the worker's name.
            number: of an earlier start, from 1 on; 0 for the last one. Pages older than the last ones are removed.
        """
        with contextlib.suppress(OSError), self._folder.subfolder(TIMELINES) as folder:
            for ending in ("html", "trace.json"):
                folder.remove(f"{name}.{number - _KEPT_TIMELINES}.{ending}")
        return self.path / TIMELINES / (f"{name}.{number}.html" if number else f"{name}.html")

    def write_excluded(self, nodes: Sequence[ExcludedNode]) -> None:
        """Write ``excluded.json``. Does not raise: an end without it is better than none."""
        with contextlib.suppress(OSError):
            write_excluded(self._folder, _job_id(), nodes)

    def write_end(self, exit_code: int, report: str) -> None:
        """Write how the deployment has ended, for `dynamo-mpi wait`. Does not raise.

        Args:
            exit_code: the launcher's exit code.
            report: its report.
        """
        _write_end(self._folder, exit_code, report)

    def close(self) -> None:
        """Remove the files of a running deployment, and release the folder; logs stay."""
        with contextlib.suppress(OSError):
            self._clear("ready")
        for name in (SERVICES, STOP, DEPLOYMENT):
            with contextlib.suppress(OSError):
                self._folder.remove(name)
        super().close()

    def _prepare(self) -> None:
        with self._folder.subfolder("logs", create=True) as logs:
            for name in logs.names():
                if name.endswith(".log"):
                    logs.rename(name, f"{name}.old")
        self._clear("ready")
        self._clear(TIMELINES, ".html", ".json")
        self.take_replace_requests()
        for name in (SERVICES, STOP, DEPLOYMENT, ENDED):
            self._folder.remove(name)
        if not read_excluded(self._folder, _job_id()):
            self._folder.remove(EXCLUDED)

    def _clear(self, subfolder: str, *endings: str) -> None:
        with self._folder.subfolder(subfolder, create=True) as folder:
            for name in folder.names():
                if name.endswith(endings or ("",)):
                    folder.remove(name)


def write_refusal(path: Path, exit_code: int, report: str) -> None:
    """Write into a folder that a launch was refused, for a parallel `wait`, unless a deployment runs there. Does not raise.

    Args:
        path: the folder; created if it doesn't exist.
        exit_code: the launcher's exit code.
        report: its report.
    """
    with contextlib.suppress(OSError, DynamoMpiError), contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_run_dir(path, create=True))
        lock = _take_lock(folder, LOCK, ("", ""), lambda text: None)
        stack.callback(os.close, lock)
        _write_end(folder, exit_code, report)


def _take_lock(folder: OwnFolder, name: str, held: tuple[str, str], warn: Callable[[str], None]) -> int:
    """Return the folder's locked and empty lock file."""
    while True:
        lock = folder.open(name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 4096).decode(errors="replace")
            os.close(lock)
            raise UsageError(
                f"{held[0]} {folder.path}: {_owner(owner)}", expected="one folder for each", fix=held[1]
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
            warn(f"{folder.path} can't be locked ({error.strerror}): make sure that no other job uses it")
        if folder.holds(name, lock):
            os.ftruncate(lock, 0)
            return lock
        os.close(lock)  # its owner removed it between our two calls


def _owner(text: str) -> str:
    try:
        content = json.loads(text)
        job = f", job {content['job_id']}" if content["job_id"] else ""
        return f"process {content['pid']} on {content['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "one that has just started"


def _write_end(folder: OwnFolder, exit_code: int, report: str) -> None:
    content = {"schema": ENDED_SCHEMA, "exit_code": exit_code, "report": report[:_LONGEST_REPORT]}
    with contextlib.suppress(OSError):
        write_object(folder, ENDED, {**content, "time": time.time()})


def _job_id() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _names(folder: OwnFolder) -> list[str]:
    """List a folder; empty if its file system fails for a moment, which must not end a deployment.

    A look-up of a single file isn't enough: a network file system may cache for some time that it didn't exist.
    """
    try:
        return folder.names()
    except OSError:
        return []
