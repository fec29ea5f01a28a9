# SPDX-License-Identifier: Apache-2.0
"""Folders that one process has for itself until it ends, below ``PARENT/dynamo-mpi-caches-UID/``, each with its lock in it.

The kernel releases the lock with the process. What a killed process leaves is removed by its node agent, or by the next claim beside it.
A folder is renamed before it is removed, so that a claim never finds one that is half gone; and a claim holds only if the lock file that was
locked is still the folder's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil

from dynamo_mpi.common.folder_walk import user_folder
from dynamo_mpi.common.own_files import OwnFolder

LOCK = ".lock"
_PREFIX = "dynamo-mpi-caches"
_GONE = ".gone-"
_ATTEMPTS, _MOST_SLOTS = 20, 64


class ClaimedFolder:
    """A folder that this process has for itself.

    Args:
        path: the folder.
        lock: descriptor of its lock.
        slot: 0 if it has the name that was asked for; else how many others have taken that name.
    """

    def __init__(self, path: str, lock: int, slot: int) -> None:
        self.path, self.slot, self._lock = path, slot, lock

    def clear(self) -> None:
        """Remove what is in it."""
        for name in os.listdir(self.path):
            if name != LOCK:
                _remove_tree(os.path.join(self.path, name))

    def remove(self) -> None:
        """Remove it, and the folders above that are empty then. Idempotent; does not raise."""
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            _discard(self.path)
        os.close(self._lock)
        self._lock = -1


def claim(parent: str, name: str) -> ClaimedFolder:
    """Claim an empty folder ``name``, or ``name-s1`` and so on if other processes have it; remove what killed ones have left.

    Args:
        parent: the folder below which this user's are; created if it is missing.
        name: its name.

    Raises:
        UnsafeFileError: another user could write there.
        OSError: it can't be created, or there are no locks.
    """
    root = os.path.join(parent, user_folder(_PREFIX))
    for _ in range(_ATTEMPTS):
        try:
            with OwnFolder(root, sole=True, create=True) as folder:
                folder.require_own()
                # from here on by its path: no other user can replace any part of it
                _sweep(root)
                for slot in range(_MOST_SLOTS):
                    path = os.path.join(root, name if slot == 0 else f"{name}-s{slot}")
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700)
                    if (lock := _take(path)) >= 0:
                        claimed = ClaimedFolder(path, lock, slot)
                        claimed.clear()
                        return claimed
        except FileNotFoundError:
            continue  # another process has just removed the last folder, and the one above
    raise OSError(errno.EBUSY, f"{root} has no folder that is free")


def remove_claimed(path: str) -> None:
    """Remove a folder whose process has ended, unless another one has claimed it since. Does not raise."""
    with contextlib.suppress(OSError):
        if os.path.basename(os.path.dirname(path)) == user_folder(_PREFIX):
            _remove_if_free(path)


def _sweep(root: str) -> None:
    for name in os.listdir(root):
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):
            if name.startswith(_GONE):
                _remove_tree(path)
                continue
            try:
                _remove_if_free(path)
            except FileNotFoundError:
                # its process was killed before it made the lock; one that is about to make it starts again
                os.rmdir(path)


def _remove_if_free(path: str) -> None:
    if (lock := _take(path, create=False)) >= 0:
        try:
            _discard(path)
        finally:
            os.close(lock)


def _take(path: str, *, create: bool = True) -> int:
    """Lock a folder, without waiting; return the descriptor, -1 if another process has it.

    Raises:
        FileNotFoundError: it has just been removed.
    """
    file = os.path.join(path, LOCK)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    lock = os.open(file, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.lstat(file)):
            raise FileNotFoundError(errno.ENOENT, "it has just been replaced", file)
    except BlockingIOError:
        os.close(lock)
        return -1
    except OSError:
        os.close(lock)
        raise
    return lock


def _discard(path: str) -> None:
    """Remove a folder whose lock this process holds."""
    root = os.path.dirname(path)
    gone = os.path.join(root, f"{_GONE}{os.urandom(8).hex()}")
    os.rename(path, gone)
    _remove_tree(gone)
    with contextlib.suppress(OSError):  # others are there
        os.rmdir(root)


def _remove_tree(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
