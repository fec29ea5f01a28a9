# SPDX-License-Identifier: Apache-2.0
"""The private folder of one run: logs, etcd's data, the exported model, the launcher's session files, a socket.

Its lock file is held as long as the run lives. A run that was killed with SIGKILL can't remove its folder; the next
run does, because nobody holds that lock any more.
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
LOCK = "lock"


@contextlib.contextmanager
def private_folder(parent: Path | None = None, *, prefix: str = PREFIX) -> Iterator[Path]:
    """Make a folder only this user can enter, and remove it at the end with all that is in it.

    Args:
        parent: where; None takes the one for temporary files.
        prefix: of its name, and of those that are swept.
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
    """Remove this user's folders whose run is gone."""
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
            pass  # its run is alive, or nobody can tell: not every file system has locks
        finally:
            os.close(lock)


def _create(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another run's sweep came between: that folder is lost
            os.close(lock)
            continue
        except OSError:
            pass  # no locks here, so no sweep will take it either
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)  # a whole sweep came between
