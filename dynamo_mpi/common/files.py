# SPDX-License-Identifier: Apache-2.0
"""Directories that only this user may access.

A run holds the lock of its private directory's lock file until it ends. A run that was killed with SIGKILL can't remove its directory; the
next run does, because the lock is free; a rank's node agent does it at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "dynamo-mpi-local-"
# differ from the prefix of run directories, which may be in the same parent
SESSION_PREFIX, FLASHINFER_PREFIX = "dynamo-mpi-session-", "dynamo-mpi-flashinfer-"
LOCK = "lock"


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
