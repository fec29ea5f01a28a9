# SPDX-License-Identifier: Apache-2.0
"""The folder of one deployment, which all its nodes see.

lock               held as long as the launcher lives
deployment.json    what runs where; gone once it has ended
ended.json         how the last deployment here ended; gone when the next one starts
services.json      the services' addresses and credentials (0600); gone once they have ended
ready/NAME.json    a worker that serves
timeline/NAME.html a worker's start as a page, NAME.trace.json for Perfetto; launch.json has the launcher's own steps; kept until a further
                   deployment starts in the folder
failures/NAME/     a worker's failure files; made when the first is written
logs/NAME.log      a step's output; kept, as NAME.log.old when a further deployment starts in the folder
stop               whoever makes this file ends the deployment
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import BootstrapError, UsageError
from dynamo_mpi.services.own_folder import require_own

if TYPE_CHECKING:
    from pathlib import Path

ENDED_SCHEMA = 1
# of what stands in ended.json: the whole of it is in the logs
_LONGEST_REPORT = 8192
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunDir:
    """A deployment's folder, made and held.

    Args:
        path: where; made if there is none.

    Raises:
        UsageError: it can't be used, isn't ours alone, or another deployment holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs, self._ready = path / "logs", path / "ready"
        self._timelines = path / "timeline"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_own(path)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take_lock()
            self.logs.mkdir(mode=0o700, exist_ok=True)
            self._ready.mkdir(mode=0o700, exist_ok=True)
            self._timelines.mkdir(mode=0o700, exist_ok=True)
            for log in self.logs.glob("*.log"):
                log.replace(log.with_suffix(".log.old"))
            for stale in (
                *self._ready.iterdir(),
                *self._timelines.glob("*.html"),
                *self._timelines.glob("*.json"),
                self._services,
                self._stop,
                self._deployment,
                self._ended,
            ):
                stale.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"the run folder {path} can't be used: {error.strerror}",
                needed="a folder that all nodes see and that we may write",
                fix="--run-dir FOLDER, or DYN_MPI_RUN_DIR",
            ) from None

    @property
    def _services(self) -> Path:
        return self.path / "services.json"

    @property
    def _deployment(self) -> Path:
        return self.path / "deployment.json"

    @property
    def _ended(self) -> Path:
        return self.path / "ended.json"

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def log(self, name: str) -> Path:
        """Return where a step's output goes."""
        return self.logs / f"{name}.log"

    def ready_file(self, name: str) -> Path:
        """Return what a worker writes once it serves."""
        return self._ready / f"{name}.json"

    def failures(self, name: str) -> Path:
        """Return the folder of a worker's failure files."""
        return self.path / "failures" / name

    @property
    def milestones(self) -> Path:
        """Where the launcher writes how long its own steps took."""
        return self._timelines / "launch.json"

    def services(self) -> dict[str, Any] | None:
        """Return what the services wrote when all of them answered, or None."""
        return _read(self._services) if self._services.name in _names(self.path) else None

    def is_ready(self, name: str) -> bool:
        """Tell whether a worker serves."""
        return f"{name}.json" in _names(self._ready)

    def is_to_stop(self) -> bool:
        """Tell whether somebody asked for the end."""
        return self._stop.name in _names(self.path)

    def describe(self, content: dict[str, Any]) -> None:
        """Say what runs where, for the operator's commands."""
        _write(self._deployment, content)

    def tell_end(self, exit_code: int, report: str) -> None:
        """Say how the deployment has ended, for whoever waits for it. Does not raise.

        Args:
            exit_code: the launcher's.
            report: why, in its words.
        """
        _tell_end(self._ended, exit_code, report)

    def close(self) -> None:
        """Say that nothing runs any more; logs stay."""
        ready = [self._ready / name for name in _names(self._ready)]
        for path in (*ready, self._services, self._stop, self._deployment):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UsageError(
                f"another deployment runs in {self.path}",
                needed="one folder for each",
                fix="another --run-dir, or end that one: dynamo-mpi down --run-dir …",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # a file system without locks: two launchers are the user's to avoid
                raise


def tell_refusal(path: Path, exit_code: int, report: str) -> None:
    """Say in a folder that a launch into it was refused, for a `wait` beside it; unless a deployment runs there. Does not raise.

    Args:
        path: the folder; made if there is none.
        exit_code: the launcher's.
        report: why, in its words.
    """
    with contextlib.suppress(OSError, BootstrapError), contextlib.ExitStack() as stack:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(path)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _tell_end(path / "ended.json", exit_code, report)


def _tell_end(path: Path, exit_code: int, report: str) -> None:
    content = {"schema": ENDED_SCHEMA, "exit_code": exit_code, "report": report[:_LONGEST_REPORT]}
    with contextlib.suppress(OSError):
        _write(path, {**content, "time": time.time()})


def _names(folder: Path) -> list[str]:
    """List a folder; nothing where its file system fails us for a moment, which is no reason to end a deployment.

    To look for a file by its own name isn't enough: a network file system may remember for a while that it wasn't there.
    """
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that only its owner reads; it is there at once, with all that is in it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
