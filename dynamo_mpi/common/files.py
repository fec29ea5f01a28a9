# SPDX-License-Identifier: Apache-2.0
"""Directories that only this user may access, and files that other processes see whole or not at all.

A run holds the lock of its private directory's lock file until it ends. A run that was killed with SIGKILL can't remove its directory; the
next run does, because the lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dynamo_mpi.common.errors import UsageError

PREFIX = "dynamo-mpi-local-"
LOCK = "lock"
_WRITABLE_BY_OTHERS = 0o022


@contextlib.contextmanager
def private_dir(parent: Path | None = None, *, prefix: str = PREFIX) -> Iterator[Path]:
    """Create a directory that only this user can access, and remove it with its content at the end.

    Args:
        parent: the parent directory; None for that of temporary files.
        prefix: prefix of its name, and of stale directories that are removed.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent, prefix)
    folder, lock = _create(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path, prefix: str = PREFIX) -> None:
    """Remove this user's directories whose run has ended."""
    for folder in parent.glob(prefix + "*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its run is alive, or the file system has no locks
        finally:
            os.close(lock)


def _create(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another run is just removing the directory
            os.close(lock)
            continue
        except OSError:
            pass  # the file system has no locks, so no other run removes it either
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)  # another run has removed the directory


def require_private(folder: Path) -> None:
    """Check that a directory belongs to this user and that others can't write to it.

    Raises:
        UsageError: it doesn't, or they can.
        OSError: it can't be read.
    """
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"the job's folder {folder} belongs to user {status.st_uid}",
            expected=f"a folder of user {os.geteuid()}: it holds the job's credentials",
            fix="another --run-dir",
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise UsageError(
            f"others can write in the job's folder {folder} (mode {status.st_mode & 0o7777:04o})",
            expected="a folder that only you can write: it holds the job's credentials",
            fix=shlex.join(["chmod", "700", str(folder)]),
        )


def write_atomically(path: Path, content: str) -> None:
    """Write a file, readable by its owner alone, that other processes see whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
