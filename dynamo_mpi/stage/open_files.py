# SPDX-License-Identifier: Apache-2.0
"""The files of a model or of a copy, open.

The model's own are read past the page cache on a shared file system, if that can: it saves a copy in memory, and leaves the cache to others.
A disk of this node is read faster in order and ahead, and may be in the cache already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.stage.file_system import file_system_type, is_shared
from dynamo_mpi.stage.manifest import require_unchanged

if TYPE_CHECKING:
    from dynamo_mpi.stage.manifest import Manifest

# what a file system answers that can't, or whose blocks are larger than a page
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class OpenFiles:
    """Descriptors of a model's files, each opened once. Thread-safe.

    Args:
        folder: the model's folder, or its copy's.
        manifest: its files.
        flags: as for `os.open`.
        check: whether a file must be as the manifest has it.
    """

    def __init__(self, folder: str, manifest: Manifest, flags: int, *, check: bool = False) -> None:
        self._folder, self._manifest, self._flags, self._check = folder, manifest, flags, check
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}

    def path(self, number: int) -> str:
        """Return a file's path."""
        return os.path.join(self._folder, self._manifest.files[number].path)

    def descriptor(self, number: int) -> int:
        """Return a file's descriptor.

        Raises:
            SourceChangedError: it isn't as the manifest has it.
            OSError: it can't be opened.
        """
        found = self._open.get(number)
        if found is None:
            opened = self._open_one(self.path(number))
            with self._lock:
                found = self._open.setdefault(number, opened)
            if found != opened:
                os.close(opened)
            self.require_unchanged(number)
        return found

    def require_unchanged(self, number: int) -> None:
        """Check an open file again.

        Raises:
            SourceChangedError: it isn't as the manifest has it.
        """
        if self._check:
            require_unchanged(self.path(number), self._manifest.files[number], os.fstat(self._open[number]))

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _open_one(self, path: str) -> int:
        return os.open(path, self._flags | os.O_CLOEXEC)


class Source(OpenFiles):
    """The model's own files, which must stay as the manifest has them. Thread-safe.

    Args:
        manifest: the model.
    """

    def __init__(self, manifest: Manifest) -> None:
        direct = 0
        with contextlib.suppress(OSError):  # a model that is gone: opening a file says so, with its name
            direct = os.O_DIRECT if is_shared(file_system_type(manifest.source)) else 0
        super().__init__(manifest.source, manifest, os.O_RDONLY | direct, check=True)

    def read(self, number: int, buffer: memoryview, offset: int) -> int:
        """Read a part of a file; return how many bytes are in ``buffer``, none at the file's end.

        Args:
            number: the file.
            buffer: from `new_buffer`, or its beginning.
            offset: where the part begins.

        Raises:
            SourceChangedError: it isn't as the manifest has it.
            OSError: it can't be read.
        """
        descriptor = self.descriptor(number)
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        # a file system that refuses it only now, or that has given less than was asked for, so that it goes on between two blocks
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_RDONLY)
        return os.preadv(descriptor, [buffer], offset)

    def _open_one(self, path: str) -> int:
        try:
            return super()._open_one(path)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def new_buffer(size: int) -> memoryview:
    """Return memory into which a file can be read past the page cache: it begins with a page."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def whole_pages(size: int) -> int:
    """Return ``size`` rounded up to a multiple of a page, as such reads must be."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
