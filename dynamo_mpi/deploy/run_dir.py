# SPDX-License-Identifier: Apache-2.0
"""The folder of one deployment, on a file system that all its nodes share. It holds credentials, so only its user may have access.

lock               held while the launcher runs; names its process
services.lock      the same for the services' process; removed when it ends
services/NAME.log  a service's output, of the last start in the folder
deployment.json    the workers and their nodes; removed when it ends
ended.json         how the last deployment here ended; removed when the next one starts
services.json      the services' addresses and credentials (0600); removed when they end
ready/NAME.json    exists while a worker serves
timeline/NAME.html a worker's start as a page, NAME.trace.json for Perfetto; launch.json has the launcher's own steps; kept until a further
                   deployment starts in the folder
failures/NAME/     a worker's failure files; made when the first is written
logs/NAME.log      a step's output; kept, as NAME.log.old when a further deployment starts in the folder
stop               if it exists, the deployment ends
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

from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.common.files import require_private

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ENDED_SCHEMA = 1
# limit of the report in ended.json: the logs have all of it
_LONGEST_REPORT = 8192
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class _HeldFolder:
    """A run folder, created if it doesn't exist, and locked by this process until `close`.

    Args:
        path: the folder.
        lock: name of the lock file.
        held: the error and its fix if another process holds the lock.
        job_id: Slurm's job id, for the message of a process that finds it locked.
        warn: logs a warning if the file system has no locks.

    Raises:
        UsageError: it can't be created or used, others can write in it, or another process holds it.
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
            self._lock = _take_lock(path, lock, held, warn)
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id}
            os.write(self._lock, json.dumps(owner).encode())
            self._prepare()
        except OSError as error:
            raise UsageError(
                f"the run folder {path} can't be used: {error.strerror}",
                expected="a folder that all nodes see and that this user can make and write",
                fix="--run-dir FOLDER, or DYN_MPI_RUN_DIR",
            ) from None

    @property
    def services_file(self) -> Path:
        """The file with the services' addresses and credentials; it exists when they are ready."""
        return self.path / "services.json"

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)

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
        super().__init__(path, "services.lock", held, job_id, warn)

    def new_log(self, name: str) -> Path:
        """Return an empty file for a service's output, which only this user can read."""
        log = self.path / "services" / f"{name}.log"
        descriptor = os.open(log, _NEW | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        return log

    def publish(self, content: Mapping[str, Any]) -> None:
        """Write ``services.json``."""
        _write(self.services_file, content)

    def retract(self) -> None:
        """Remove ``services.json``. Idempotent."""
        self.services_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove ``services.json``, and release the folder."""
        self.retract()
        (self.path / "services.lock").unlink(missing_ok=True)
        super().close()

    def _prepare(self) -> None:
        logs = self.path / "services"
        logs.mkdir(mode=0o700, exist_ok=True)
        logs.chmod(0o700)
        self.retract()


class RunDir(_HeldFolder):
    """The run folder in the deployment's launcher.

    Args:
        path: the folder; created if it doesn't exist.

    Raises:
        UsageError: it can't be created or used, others can write in it, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.logs, self._ready, self._timelines = path / "logs", path / "ready", path / "timeline"
        self._deployment, self._ended, self._stop = path / "deployment.json", path / "ended.json", path / "stop"
        held = ("another deployment runs in", "another --run-dir, or end that one: dynamo-mpi down --run-dir …")
        super().__init__(path, "lock", held)

    def log(self, name: str) -> Path:
        """Return the log file of a step."""
        return self.logs / f"{name}.log"

    def ready_file(self, name: str) -> Path:
        """Return the path of a worker's ready file."""
        return self._ready / f"{name}.json"

    def failures(self, name: str) -> Path:
        """Return the folder of a worker's failure files."""
        return self.path / "failures" / name

    @property
    def milestones(self) -> Path:
        """The file with the durations of the launcher's own steps."""
        return self._timelines / "launch.json"

    def services(self) -> dict[str, Any] | None:
        """Return the content of ``services.json``; None if it doesn't exist yet."""
        return _read(self.services_file) if self.services_file.name in _names(self.path) else None

    def is_ready(self, name: str) -> bool:
        """Return whether a worker serves."""
        return f"{name}.json" in _names(self._ready)

    def stop_requested(self) -> bool:
        """Return whether the end was requested."""
        return self._stop.name in _names(self.path)

    def describe(self, content: Mapping[str, Any]) -> None:
        """Write ``deployment.json``, for the operator's commands."""
        _write(self._deployment, content)

    def write_end(self, exit_code: int, report: str) -> None:
        """Write how the deployment has ended, for `dynamo-mpi wait`. Does not raise.

        Args:
            exit_code: the launcher's exit code.
            report: its report.
        """
        _write_end(self._ended, exit_code, report)

    def close(self) -> None:
        """Remove the files of a running deployment, and release the folder; logs stay."""
        ready = [self._ready / name for name in _names(self._ready)]
        for path in (*ready, self.services_file, self._stop, self._deployment):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        super().close()

    def _prepare(self) -> None:
        for folder in (self.logs, self._ready, self._timelines):
            folder.mkdir(mode=0o700, exist_ok=True)
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.old"))
        pages = (*self._timelines.glob("*.html"), *self._timelines.glob("*.json"))
        states = (self.services_file, self._stop, self._deployment, self._ended)
        for stale in (*self._ready.iterdir(), *pages, *states):
            stale.unlink(missing_ok=True)


def write_refusal(path: Path, exit_code: int, report: str) -> None:
    """Write into a folder that a launch was refused, for a parallel `wait`, unless a deployment runs there. Does not raise.

    Args:
        path: the folder; created if it doesn't exist.
        exit_code: the launcher's exit code.
        report: its report.
    """
    with contextlib.suppress(OSError, DynamoMpiError), contextlib.ExitStack() as stack:
        lock = _take_lock(path, "lock", ("", ""), lambda text: None)
        stack.callback(os.close, lock)
        _write_end(path / "ended.json", exit_code, report)


def _take_lock(path: Path, name: str, held: tuple[str, str], warn: Callable[[str], None]) -> int:
    """Create the folder, and return its locked and empty lock file."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(path)
    while True:
        lock = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 4096).decode(errors="replace")
            os.close(lock)
            raise UsageError(
                f"{held[0]} {path}: {_owner(owner)}", expected="one folder for each", fix=held[1]
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
            warn(f"{path} can't be locked ({error.strerror}): make sure that no other job uses it")
        if _is_still(lock, path / name):
            os.ftruncate(lock, 0)
            return lock
        os.close(lock)  # its owner removed it between our two calls


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner(text: str) -> str:
    try:
        content = json.loads(text)
        job = f", job {content['job_id']}" if content["job_id"] else ""
        return f"process {content['pid']} on {content['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "one that has just started"


def _write_end(path: Path, exit_code: int, report: str) -> None:
    content = {"schema": ENDED_SCHEMA, "exit_code": exit_code, "report": report[:_LONGEST_REPORT]}
    with contextlib.suppress(OSError):
        _write(path, {**content, "time": time.time()})


def _names(folder: Path) -> list[str]:
    """List a folder; empty if its file system fails for a moment, which must not end a deployment.

    A look-up of a single file isn't enough: a network file system may cache for some time that it didn't exist.
    """
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that only its owner can read, atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, _NEW | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
