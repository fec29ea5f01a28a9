# SPDX-License-Identifier: Apache-2.0
"""The job's folder, on a file system that all its nodes share: the services' logs, and the word that they are ready.

It holds the job's credentials, so nobody else may write in it, and one services process at a time has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import UsageError
from dynamo_mpi.services.own_folder import require_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SERVICES, LOCK, LOGS = "services.json", "services.lock", "services"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class RunFolder:
    """The folder, held by this process."""

    path: Path

    @property
    def services(self) -> Path:
        """What tells that the services are ready, and how to reach them."""
        return self.path / SERVICES

    def new_log(self, name: str) -> Path:
        """Return an empty file for a part's output, which only this user can read."""
        log = self.path / LOGS / f"{name}.log"
        descriptor = os.open(log, _NEW | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        return log

    def publish(self, content: Mapping[str, Any]) -> None:
        """Write ``services.json``: it appears whole, by a rename."""
        draft = self.path / f".{SERVICES}"
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, _NEW | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.services)

    def retract(self) -> None:
        """Take ``services.json`` away. Idempotent."""
        self.services.unlink(missing_ok=True)


@contextlib.contextmanager
def held_run_folder(path: Path, job_id: str | None, say: Callable[[str], None]) -> Iterator[RunFolder]:
    """Make the folder if need be, and hold it until the block ends.

    Args:
        path: the folder.
        job_id: Slurm's, for whoever finds the folder held.
        say: takes a warning.

    Raises:
        UsageError: it can't be made or used, others can write in it, or another services process has it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(path)
        (path / LOGS).mkdir(mode=0o700, exist_ok=True)
        (path / LOGS).chmod(0o700)
        lock = _lock(path, say)
    except OSError as error:
        raise UsageError(
            f"the job's folder {path} can't be used: {error.strerror}",
            needed="a folder that this user can make and write",
            fix="correct --run-dir / DYN_MPI_RUN_DIR",
        ) from None
    folder = RunFolder(path)
    try:
        os.write(lock, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id}).encode())
        folder.retract()  # of one that was killed
        yield folder
    finally:
        folder.retract()
        (path / LOCK).unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path, say: Callable[[str], None]) -> int:
    while True:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 4096).decode(errors="replace")
            os.close(lock)
            raise UsageError(
                f"another services process has the job's folder {path}: {_owner(owner)}",
                fix="stop that one, or take another --run-dir",
            ) from None
        except OSError as error:
            say(f"{path} can't be locked ({error.strerror}): make sure that no other job uses it")
        if _is_still(lock, path / LOCK):
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
