# SPDX-License-Identifier: Apache-2.0
"""Which extents a node has, while several threads write them; a file is stored once no thread writes to it any more."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.stage.digest import digest_of
from dynamo_mpi.stage.manifest import SourceChangedError, StageError

if TYPE_CHECKING:
    from dynamo_mpi.stage.manifest import Extent, Manifest
    from dynamo_mpi.stage.partial import PartialCopy


class Holdings:
    """The extents that a node has. Thread-safe.

    An extent may come twice, from a reader and from a neighbour: the first that is complete counts, and the other must be the same. What two
    threads have written, one over the other, is read again before it is stored.

    Args:
        manifest: the model.
        copy: this node's copy.
    """

    def __init__(self, manifest: Manifest, copy: PartialCopy) -> None:
        self._manifest, self._copy = manifest, copy
        self.extents = manifest.extents()
        self._lock = threading.Lock()
        self._digests = [""] * len(self.extents)
        self._missing = [0] * len(manifest.files)
        for extent in self.extents:
            self._missing[extent.file] += 1
        self._writers = [0] * len(manifest.files)
        self._first_writer: dict[int, int] = {}
        self._written_twice: set[int] = set()
        self._unsynced = len(manifest.files)
        self._to_sync: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.size = 0
        """Bytes of the extents that are here."""
        for number, file in enumerate(manifest.files):
            if not file.size:
                self._to_sync.put(number)

    @property
    def is_complete(self) -> bool:
        """Whether all extents are here."""
        return self.size == self._manifest.size

    def extent(self, number: int) -> Extent:
        """Return where an extent belongs."""
        return self.extents[number]

    def has(self, number: int) -> bool:
        """Return whether an extent is here."""
        return bool(self._digests[number])

    def digest(self, number: int) -> str:
        """Return the digest of an extent; empty if it isn't here."""
        return self._digests[number]

    def digests(self) -> tuple[str, ...]:
        """Return the digests of all extents."""
        return tuple(self._digests)

    def missing(self, besides: set[int], most: int) -> list[int]:
        """Return some extents that aren't here, nor among ``besides``, the last first."""
        numbers = (n for n in range(len(self.extents) - 1, -1, -1) if not self._digests[n] and n not in besides)
        return [number for number, _ in zip(numbers, range(most), strict=False)]

    def write(self, number: int, offset: int, data: memoryview) -> bool:
        """Write a part of an extent; return whether that was still needed. A file that is complete isn't touched any more.

        Raises:
            StageError: it can't be written.
        """
        file = self.extents[number].file
        with self._lock:
            if self._digests[number]:
                return False
            self._writers[file] += 1
            if self._first_writer.setdefault(number, threading.get_ident()) != threading.get_ident():
                self._written_twice.add(number)
        try:
            self._copy.write(file, offset, data)
        finally:
            with self._lock:
                self._writers[file] -= 1
            self._sync_if_written(file)
        return True

    def arrived(self, number: int, digest: str) -> bool:
        """Note that an extent has been written completely; return whether it is new.

        Raises:
            SourceChangedError: it is here already, with another content.
        """
        extent = self.extents[number]
        with self._lock:
            before = self._digests[number]
            if not before:
                self._digests[number] = digest
                self.size += extent.length
                self._missing[extent.file] -= 1
        if not before:
            self._sync_if_written(extent.file)
        elif before != digest:
            path = self._manifest.files[extent.file].path
            raise SourceChangedError(f"{path} was read twice, with different content")
        return not before

    def sync(self) -> bool:
        """Store files as they become complete, until the last one is stored or `close`; return whether this call has stored the last one.

        Raises:
            StageError: a file can't be stored, or has not the bytes of which the digest was computed.
        """
        while (file := self._to_sync.get()) is not None:
            self._check_written_twice(file)
            self._copy.sync(file)
            with self._lock:
                self._unsynced -= 1
                if not self._unsynced:
                    return True
        return False

    def close(self, callers: int) -> None:
        """End the calls of `sync`."""
        for _ in range(callers):
            self._to_sync.put(None)

    def _check_written_twice(self, file: int) -> None:
        with self._lock:
            numbers = sorted(self._written_twice)
        for number in numbers:
            extent = self.extents[number]
            if extent.file != file:
                continue
            if digest_of(self._copy.files.descriptor(file), extent.offset, extent.length) != self._digests[number]:
                path, end = self._manifest.files[file].path, extent.offset + extent.length
                raise StageError(f"{path} was read or has arrived damaged (bytes {extent.offset} to {end})")

    def _sync_if_written(self, file: int) -> None:
        with self._lock:
            if self._missing[file] or self._writers[file]:
                return
            self._missing[file] = -1
        self._to_sync.put(file)
