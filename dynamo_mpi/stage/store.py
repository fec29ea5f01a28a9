# SPDX-License-Identifier: Apache-2.0
"""The copies of models on this node, in a folder of this user's: ``DIR/dynamo-mpi-UID/``.

    NAME-DIGEST/              a complete copy: plain files, and `MARKER`, its manifest
    .partial-NAME-DIGEST/     one that is being made, or was when its maker was killed
    .lock-NAME-DIGEST         its lock: exclusive while it is made or removed, shared while a worker uses it
    .lock                     held for moments, when locks change hands
    .node-RANDOM              of a node that looks, for moments, whether others see it

The locks are the reference count: the kernel releases them when a worker ends, however it ends. All of it is trusted only because no other
user can write there (`own_files`), and because the file system is this node's own: on a shared one, ``flock`` may mean nothing. Known types
of shared ones are refused; of the others, the nodes find out by their marks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.folder_walk import reason, user_folder
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.file_system import file_system_type, free_bytes, is_in_memory, is_shared, size_on_disk
from dynamo_mpi.stage.manifest import Manifest, StageError, has_digests

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKER = ".dynamo-mpi-manifest.json"
PARTIAL, LOCK = ".partial-", ".lock"
_MARK = ".node-"
_MARK_SECONDS = 3600.0
_MAX_MARKER_BYTES = 64 << 20
_SPARE_BYTES = 64 << 20
_MUTEX_SECONDS, _POLL_SECONDS = 10.0, 0.01


class State(Enum):
    """What this node has of a model."""

    COMPLETE = "complete"
    """A copy, which the caller's lock keeps from being removed."""
    MISSING = "missing"
    """None; the caller's lock is exclusive, for it to make one."""
    BUSY = "busy"
    """Another worker makes one; the caller has no lock."""


class Entry(NamedTuple):
    """A copy in the store.

    Args:
        name: its folder's name.
        size: bytes; of an incomplete one, those that are there.
        used: when a worker last took it, in seconds since 1970.
        in_use: whether a worker uses or makes it.
        complete: whether it is complete, and its files are as they were copied.
        source: the folder that it is a copy of; empty if it was never complete.
    """

    name: str
    size: int
    used: float
    in_use: bool
    complete: bool
    source: str = ""


class Store:
    """This user's copies below a folder.

    Args:
        folder: the folder.
        create: create it, and this user's folder in it, if they are missing; not the folders before it, whose names may be misspelt.

    Raises:
        StageError: it can't be used: another user can write there, or it isn't on a file system of this node.
        FileNotFoundError: there is no such folder, and it isn't to be created.
    """

    def __init__(self, folder: str, *, create: bool = True) -> None:
        try:
            with (
                OwnFolder(folder, create=create, parents=False) as parent,
                parent.subfolder(user_folder(), create=create) as own,
            ):
                self.path = os.path.realpath(own.path)
            self.type = file_system_type(self.path)
            self._root = OwnFolder(self.path, guarded=True)
        except OSError as error:
            if not create and isinstance(error, FileNotFoundError):
                raise
            raise StageError(f"{folder} can't be used: {reason(error)}") from None
        if is_shared(self.type):
            self.close()
            raise StageError(f"{folder} is on a shared file system ({self.type}), not on a disk of this node")

    def close(self) -> None:
        """Let go of the folder. Idempotent."""
        self._root.close()

    @property
    def in_memory(self) -> bool:
        """Whether copies take memory of the node."""
        return is_in_memory(self.type)

    def copy_path(self, name: str) -> str:
        """Return the folder of a complete copy."""
        return os.path.join(self.path, name)

    def open_lock(self, name: str) -> int:
        """Open the lock of a copy, which is free until `take`; return the descriptor.

        Raises:
            StageError: it can't be opened.
        """
        try:
            return self._root.open(f"{LOCK}-{name}", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StageError(f"{self.path} can't be used: {reason(error)}") from None

    def mark(self) -> str:
        """Create an empty file with a name of its own, which another node sees only if the file system is shared; return its name.

        Raises:
            OSError: it can't be created.
        """
        for name in self._root.names():
            # of a rank that was killed
            if (
                name.startswith(_MARK)
                and time.time() - os.lstat(os.path.join(self.path, name)).st_mtime > _MARK_SECONDS
            ):
                self._root.remove(name)
        name = f"{_MARK}{secrets.token_hex(16)}"
        os.close(self._root.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        return name

    def has_mark(self, name: str) -> bool:
        """Return whether a node's mark is here."""
        return os.path.lexists(os.path.join(self.path, name))

    def unmark(self, name: str) -> None:
        """Remove this node's mark."""
        with contextlib.suppress(OSError):
            self._root.remove(name)

    def take(self, lock: int, manifest: Manifest, *, digests: bool = False) -> State:
        """Lock a copy, without waiting: shared if it is complete, exclusively if it is to be made.

        A damaged copy that other workers use counts as one that another worker makes.

        Args:
            lock: the result of `open_lock`.
            manifest: the model.
            digests: whether to read all of its files to check them, beside their sizes and times.

        Raises:
            StageError: there are no locks here, or another process holds up all others.
        """
        if not self._lock(lock, fcntl.LOCK_SH):
            return State.BUSY
        if self.is_complete(manifest, digests=digests):
            os.utime(lock)
            return State.COMPLETE
        # without the mutex, two workers that both hold it shared could not become its maker
        with self._mutex():
            fcntl.flock(lock, fcntl.LOCK_UN)
            if not self._lock(lock, fcntl.LOCK_EX):
                return State.BUSY
            # made meanwhile; but what was just found to be damaged stays so
            if not digests and self.is_complete(manifest):
                self._lock_soon(lock, fcntl.LOCK_SH)
                os.utime(lock)
                return State.COMPLETE
        return State.MISSING

    def share(self, lock: int) -> None:
        """Keep a copy that the caller has made: from now on, other workers can use it too."""
        with self._mutex():
            self._lock_soon(lock, fcntl.LOCK_SH)
        os.utime(lock)

    def is_complete(self, manifest: Manifest, *, digests: bool = False) -> bool:
        """Return whether there is a complete copy: its marker, and every file with its size and time."""
        path = self.copy_path(manifest.folder_name)
        try:
            marker = self.read_marker(manifest.folder_name)
        except (OSError, ValueError):
            return False
        if marker.source != manifest.source or marker.files != manifest.files:
            return False
        for file in marker.files:
            try:
                status = os.lstat(os.path.join(path, file.path))
            except OSError:
                return False
            if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                return False
        return not digests or has_digests(path, marker)

    def is_damaged(self, manifest: Manifest) -> bool:
        """Return, of a copy whose digests `take` has just found to be wrong, whether nothing but them tells; or they aren't known."""
        return self.is_complete(manifest) and self.read_marker(manifest.folder_name).can_be_checked

    def can_feed(self, manifest: Manifest) -> bool:
        """Return whether a complete copy has digests of the extents in which the model is copied now."""
        with contextlib.suppress(OSError, ValueError):
            marker = self.read_marker(manifest.folder_name)
            is_alike = (marker.algorithm, marker.extent_bytes) == (manifest.algorithm, manifest.extent_bytes)
            return is_alike and len(marker.digests) == len(manifest.extents())
        return False

    def read_marker(self, name: str) -> Manifest:
        """Return the manifest of a complete copy, with the digests of its extents.

        Raises:
            OSError: there is none.
            ValueError: it is damaged.
        """
        with self._root.subfolder(name) as folder:
            return Manifest.from_json(folder.read(MARKER, _MAX_MARKER_BYTES))

    def clear(self, name: str) -> None:
        """Remove what is left of a copy, whose exclusive lock the caller has. A complete one is hidden first: all of it goes at once."""
        partial = os.path.join(self.path, f"{PARTIAL}{name}")
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(self.copy_path(name), partial)
            shutil.rmtree(partial, ignore_errors=True)

    def make_room(self, size: int, name: str) -> list[str]:
        """Make room for a copy of ``size`` bytes: remove what killed workers have left, then unused copies, the least recently used first.

        Returns:
            The names of the complete copies that were removed.

        Raises:
            StageError: there is not enough room.
        """
        entries = sorted(self.entries(), key=lambda entry: (entry.complete, entry.used))
        removed: list[str] = []
        needed = size + _SPARE_BYTES
        for entry in entries:
            if entry.name == name or (entry.complete and self.free_bytes() >= needed):
                continue
            if self.remove(entry.name) and entry.complete:
                removed.append(entry.name)
        free = self.free_bytes()
        if free < needed:
            kind = "memory, within the job's limit" if self.in_memory else self.type
            used = [entry.name for entry in entries if entry.in_use and entry.name != name]
            kept = f"; in use and kept: {', '.join(used)}" if used else ""
            raise StageError(f"{self.path} ({kind}) has {gib(free)} free, and the model needs {gib(needed)}{kept}")
        return removed

    def free_bytes(self) -> int:
        """Return how many bytes can be written here; of memory, what the node and the job's limit can give."""
        return free_bytes(self.path)

    def remove(self, name: str) -> bool:
        """Remove a copy, unless it is in use; return whether it was removed."""
        try:
            lock = self.open_lock(name)
        except StageError:
            return False
        try:
            with self._mutex():
                if not self._lock(lock, fcntl.LOCK_EX):
                    return False
            # not within the mutex, for which all other workers wait: this may take minutes
            self.clear(name)
            return not os.path.lexists(self.copy_path(name))
        finally:
            os.close(lock)

    def entries(self) -> list[Entry]:
        """Return all copies, also those that are incomplete, by name."""
        names = self._root.names()
        copies = {each.removeprefix(PARTIAL) for each in names if each.startswith(PARTIAL)}
        copies |= {each for each in names if not each.startswith(".")}
        return [self._entry(name) for name in sorted(copies)]

    def _entry(self, name: str) -> Entry:
        lock = self.open_lock(name)
        try:
            used = os.fstat(lock).st_mtime
            in_use = not self._lock(lock, fcntl.LOCK_EX)
        finally:
            os.close(lock)
        try:
            marker = self.read_marker(name)
        except (OSError, ValueError):
            size = size_on_disk(os.path.join(self.path, f"{PARTIAL}{name}")) + size_on_disk(self.copy_path(name))
            return Entry(name, size, used, in_use, complete=False)
        complete = marker.folder_name == name and self.is_complete(marker)
        return Entry(name, marker.size, used, in_use, complete, marker.source)

    def _lock(self, lock: int, kind: int) -> bool:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StageError(f"{self.path} has no locks: {error.strerror}") from None
        return True

    def _lock_soon(self, lock: int, kind: int) -> None:
        """Lock what others hold for moments only."""
        end = time.monotonic() + _MUTEX_SECONDS
        while not self._lock(lock, kind):
            if time.monotonic() >= end:
                raise StageError(
                    f"another process has locked {self.path} for {_MUTEX_SECONDS:g} s: end or resume it (a stopped 'dynamo-mpi stage'?)"
                )
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _mutex(self) -> Iterator[None]:
        try:
            lock = self._root.open(LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StageError(f"{self.path} can't be used: {reason(error)}") from None
        try:
            self._lock_soon(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
