# SPDX-License-Identifier: Apache-2.0
"""Files and folders of this user, in places where others may write too: nothing of theirs is followed, read, waited for or overwritten.

A folder's path is walked as `folder_walk` says. Files are opened without following a link, without waiting (a FIFO never holds the caller),
and used only if they are regular and this user's. They are replaced atomically: the new content is written under a random name, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from dynamo_mpi.common.display import shell_word
from dynamo_mpi.common.folder_walk import STEP, WRITABLE_BY_OTHERS, UnsafeFileError, open_folder, reason, require_own
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

MOST_BYTES = 8 * 2**20
"""Default size limit of a file that is read."""
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class OwnFolder:
    """A directory, held by its descriptor until `close`. All names are of its entries.

    Args:
        path: the directory.
        guarded: it must be this user's, and no other user may write in it or replace it.
        create: create it and the directories before it, for this user only unless ``mode`` says otherwise, where they don't exist.
        parents: whether to create the directories before it, too.
        sole: as ``guarded``; besides, no group may write in it, on the way to it, or in its files, and it may be root's.
        mode: permissions of directories that it creates, less the umask.

    Raises:
        UnsafeFileError: the way to it leads through a link of somebody else, or it isn't as ``guarded`` or ``sole`` requires.
        OSError: it can't be opened.
    """

    _sole = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        guarded: bool = False,
        create: bool = False,
        parents: bool = True,
        sole: bool = False,
        mode: int = 0o700,
    ) -> None:
        self.path, self._sole = os.fspath(path), sole
        self._descriptor = open_folder(
            self.path, guarded=guarded or sole, create=create, parents=parents, sole=sole, mode=mode
        )

    @classmethod
    def _of(cls, path: str, descriptor: int) -> OwnFolder:
        folder = cls.__new__(cls)
        folder.path, folder._descriptor = path, descriptor
        return folder

    def __enter__(self) -> OwnFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def require_own(self) -> None:
        """Raise a `ForeignFileError` unless it is this user's own: ``sole`` takes root's as well."""
        require_own(self.path, os.fstat(self._descriptor))

    def names(self) -> list[str]:
        """Return the names of its entries, sorted."""
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def subfolder(self, name: str, *, create: bool = False) -> OwnFolder:
        """Open a directory in it, which must be this user's.

        Args:
            name: its name.
            create: create it, for this user only, if it doesn't exist.
        """
        path = os.path.join(self.path, name)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self._descriptor)
        descriptor = os.open(name, STEP | os.O_DIRECTORY, dir_fd=self._descriptor)
        try:
            require_own(path, os.fstat(descriptor))
        except OSError:
            os.close(descriptor)
            raise
        return OwnFolder._of(path, descriptor)

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a regular file of this user's; return the descriptor.

        Args:
            name: its name.
            flags: as for `os.open`.
            mode: of a new file.

        Raises:
            UnsafeFileError: it is a link, no regular file, or somebody else's.
            OSError: it can't be opened.
        """
        path = os.path.join(self.path, name)
        if flags & os.O_CREAT:
            # a new file is ours, even if the file system shows another owner
            with contextlib.suppress(FileExistsError):
                new = flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                return os.open(name, new, mode, dir_fd=self._descriptor)
            flags &= ~os.O_CREAT
        try:
            descriptor = os.open(name, (flags & ~os.O_TRUNC) | _FILE, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafeFileError(path, "is a link") from None
            if error.errno == errno.ENXIO:
                raise UnsafeFileError(path, "is no regular file") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnsafeFileError(path, "is no regular file")
            require_own(path, status, or_root=self._sole)
            if self._sole and status.st_mode & WRITABLE_BY_OTHERS:
                raise UnsafeFileError(path, "is a file that others can write", f"chmod go-w {shell_word(path)}")
            if flags & os.O_ACCMODE != os.O_RDONLY and status.st_nlink > 1:
                raise UnsafeFileError(path, "has a second name (hard link)")
            if flags & os.O_TRUNC:
                os.ftruncate(descriptor, 0)
            os.set_blocking(descriptor, True)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str, most_bytes: int = MOST_BYTES) -> bytes:
        """Return the content of a file.

        Raises:
            UnsafeFileError: as for `open`.
            OSError: it can't be read, or is larger than ``most_bytes``.
        """
        with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise OSError(errno.EFBIG, f"{os.path.join(self.path, name)} is larger than {most_bytes} bytes")
        return data

    def write(self, name: str, data: bytes, mode: int = 0o600, *, exact: bool = False, sync: bool = False) -> None:
        """Write a file that others see whole or not at all. It replaces whatever has its name, and follows no link.

        Args:
            name: its name.
            data: its content.
            mode: its permissions.
            exact: whatever the umask.
            sync: wait until it is stored.
        """
        partial = f".{name}.{os.urandom(8).hex()}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, mode, dir_fd=self._descriptor)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if exact:
                    os.fchmod(descriptor, mode)
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(descriptor)
            os.replace(partial, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=self._descriptor)
            raise

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself; no error if it doesn't exist."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def rename(self, name: str, new: str) -> None:
        """Rename an entry; it replaces another one."""
        os.replace(name, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def holds(self, name: str, descriptor: int) -> bool:
        """Return whether an entry is still the file that ``descriptor`` has open."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=self._descriptor, follow_symlinks=False))
        except FileNotFoundError:
            return False


def make_folder(path: str | os.PathLike[str], *, parents: bool = True) -> None:
    """Create a directory, and those before it unless ``parents`` is false, where they don't exist; see `OwnFolder`."""
    OwnFolder(os.fspath(path) or ".", create=True, parents=parents).close()


def open_own(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """Open a file by its path, see `OwnFolder.open`."""
    with _parent(path) as (folder, name):
        return folder.open(name, flags, mode)


def read_own(path: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> bytes:
    """Read a file by its path, see `OwnFolder.read`."""
    with _parent(path) as (folder, name):
        return folder.read(name, most_bytes)


def write_own(path: str | os.PathLike[str], data: bytes, mode: int = 0o600, *, exact: bool = False) -> None:
    """Write a file by its path, see `OwnFolder.write`."""
    with _parent(path) as (folder, name):
        folder.write(name, data, mode, exact=exact)


def remove_own(path: str | os.PathLike[str]) -> str:
    """Remove a file by its path, see `OwnFolder.remove`. Does not raise; return why it can't be removed, or an empty text."""
    try:
        with _parent(path) as (folder, name):
            folder.remove(name)
    except (FileNotFoundError, NotADirectoryError):  # then there is no such file
        return ""
    except OSError as error:
        return reason(error)
    return ""


@contextlib.contextmanager
def _parent(path: str | os.PathLike[str]) -> Iterator[tuple[OwnFolder, str]]:
    head, name = os.path.split(os.fspath(path))
    with OwnFolder(head or ".") as folder:
        yield folder, name
