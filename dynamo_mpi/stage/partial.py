# SPDX-License-Identifier: Apache-2.0
"""A copy that isn't complete: its files are written in any order, stored, and then published by one rename."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_mpi.stage.manifest import StageError
from dynamo_mpi.stage.open_files import OpenFiles
from dynamo_mpi.stage.store import MARKER, PARTIAL

if TYPE_CHECKING:
    from dynamo_mpi.stage.manifest import Manifest
    from dynamo_mpi.stage.store import Store


class PartialCopy:
    """A copy in the making. Its exclusive lock must be held.

    Args:
        store: where it is made.
        manifest: the model.

    Raises:
        StageError: it can't be created.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store, self._manifest = store, manifest
        name = manifest.folder_name
        self.path = os.path.join(store.path, f"{PARTIAL}{name}")
        self._final = store.copy_path(name)
        store.clear(name)
        folders = {os.path.dirname(file.path) for file in manifest.files} | {""}
        self._folders = sorted(os.path.join(self.path, folder) for folder in folders)
        try:
            for folder in self._folders:
                os.makedirs(folder, 0o700, exist_ok=True)
            # not as they are written: a thread that is late would create one again while `discard` removes them
            for file in manifest.files:
                os.close(os.open(os.path.join(self.path, file.path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            self.files = OpenFiles(self.path, manifest, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Write a part of a file. Thread-safe.

        Raises:
            StageError: it can't be written: the disk is full, for instance.
        """
        try:
            descriptor = self.files.descriptor(file)
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._unwritable(error) from None

    def sync(self, file: int) -> None:
        """Store a file that is complete, with its time.

        Raises:
            StageError: it can't be stored.
        """
        try:
            descriptor = self.files.descriptor(file)
            at = self._manifest.files[file].mtime_ns
            os.fchmod(descriptor, 0o400)
            os.utime(descriptor, ns=(at, at))
            os.fsync(descriptor)
        except OSError as error:
            raise self._unwritable(error) from None

    def publish(self, digests: tuple[str, ...]) -> str:
        """Make the copy visible, all of it at once; return its folder.

        Args:
            digests: of its extents.

        Raises:
            StageError: it can't be stored.
        """
        try:
            self.files.close()
            marker = os.open(
                os.path.join(self.path, MARKER), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400
            )
            with os.fdopen(marker, "w", encoding="utf-8") as file:
                file.write(self._manifest._replace(digests=digests).to_json())
                file.flush()
                os.fsync(marker)
            for folder in reversed(self._folders):
                _sync_folder(folder)
            os.rename(self.path, self._final)
            _sync_folder(self._store.path)
        except OSError as error:
            raise self._unwritable(error) from None
        return self._final

    def discard(self) -> None:
        """Remove it."""
        self.files.close()
        self._store.clear(self._manifest.folder_name)

    def _unwritable(self, error: OSError) -> StageError:
        return StageError(f"{self.path} can't be written: {error.strerror}")


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
