# SPDX-License-Identifier: Apache-2.0
"""One rank's compile caches as one file: a tar with folders and regular files alone, not compressed.

So unpacking never takes more room than the file has, and a digest over it is one over all that ranks will run. Times are kept to the
nanosecond: ninja, which FlashInfer uses, compares them, and compiles again if they are rounded. Triton's lists of files have absolute paths:
those below the folder that was packed are changed to the one into which they are unpacked. What is good in one folder only isn't unpacked
into another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tarfile
from typing import IO, TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.claimed_folder import LOCK
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.host_platform import cpu_kind
from dynamo_mpi.stage.compile_caches import is_bound, json_places

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 16 << 30
MOST_FILES = 500_000
_TIME, _HOME, _CPU = "DYNAMOMPI.mtime_ns", "DYNAMOMPI.home", "DYNAMOMPI.cpu"
_GROUP = "__grp__"
_MOST_GROUP_BYTES = 1 << 20
_CHUNK = 4 << 20
_ATTEMPTS = 3
_MOST_SHOWN = 200
# of a process that is still compiling, or has ended; locks are made again. For one that is there, torch's extensions wait for ever
_LEFT_OUT = frozenset({"tmp", "lock", "locks", "__pycache__"})


class ArchiveError(Exception):
    """An archive can't be read or written; the text says why.

    Args:
        problem: the text.
        expected: what would be right.
        fix: what the user can do.
    """

    def __init__(
        self,
        problem: str,
        expected: str = "a whole archive, made for this key on this kind of CPU",
        fix: str = "none needed: it is replaced when the worker is ready; root's by root",
    ) -> None:
        super().__init__(problem)
        self.expected, self.fix = expected, fix


class Contents(NamedTuple):
    """What a folder has.

    Args:
        files: sizes and times in nanoseconds, by path.
    """

    files: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def json(self) -> list[str]:
        """The files of `json_places`, of which all ranks must have the same."""
        return sorted(json_places() & self.files.keys())

    def new_beside(self, before: Contents) -> int:
        """Return how many files are new, or have another size. Logs don't count, as they grow at each start."""
        return sum(
            1
            for path, (size, _) in self.files.items()
            if not path.endswith(("log", "_log")) and before.files.get(path, (-1, 0))[0] != size
        )


def contents_of(folder: str) -> Contents:
    """Return the files that belong into an archive: regular ones, but for locks, temporary ones, and JSON that isn't whole."""
    found: dict[str, tuple[int, int]] = {}
    for path, status in _walk(folder, ""):
        if path not in json_places() or _is_json(os.path.join(folder, path)):
            found[path] = (status.st_size, status.st_mtime_ns)
    return Contents(found)


def pack(folder: str, target: IO[bytes]) -> tuple[str, Contents]:
    """Write a folder's files; return the digest of what was written, and what it has.

    Raises:
        ArchiveError: the files change all the time, or there are too many.
        OSError: they can't be read, or the archive can't be written.
    """
    for _ in range(_ATTEMPTS):
        contents = contents_of(folder)
        if len(contents.files) > MOST_FILES or contents.size > MOST_BYTES:
            raise ArchiveError(
                f"{folder} has {len(contents.files)} files of {contents.size} bytes: too many",
                f"at most {MOST_FILES} files of {MOST_BYTES} bytes",
                "leave --cache out, or set the variable of the library that writes so many",
            )
        target.seek(0)
        target.truncate()
        digest = hashlib.sha256()
        try:
            _write(folder, contents, _Digesting(target, digest.update))
        except FileNotFoundError:
            continue
        # what a library wrote meanwhile may be in it in part
        if contents_of(folder) == contents:
            target.flush()
            return digest.hexdigest(), contents
    raise ArchiveError(
        f"the files in {folder} have changed while they were read, {_ATTEMPTS} times",
        "that nothing is compiled for some seconds after the worker is ready",
        "none needed: the next start writes back",
    )


def unpack(source: IO[bytes], folder: str) -> None:
    """Write an archive's files below a folder, which must be empty but for its lock. Its digest must have been checked.

    Raises:
        ArchiveError: it is none, or of another kind of CPU, or has something other than folders and regular files below the folder.
        OSError: they can't be written.
    """
    count = 0
    try:
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for member in archive:
                if not count and (cpu := archive.pax_headers.get(_CPU)) != cpu_kind():
                    raise ArchiveError(f"it was made on another kind of CPU ({cpu}; this one is {cpu_kind()})")
                path = _checked(member, folder)
                count += 1
                if count > MOST_FILES:
                    raise ArchiveError(f"it has more than {MOST_FILES} files")
                home = archive.pax_headers.get(_HOME, "")
                if home != folder and is_bound(path):
                    continue
                if member.isdir():
                    os.makedirs(os.path.join(folder, path), 0o700, exist_ok=True)
                else:
                    _extract(archive, member, os.path.join(folder, path), (home, folder))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ArchiveError(f"it is no whole archive: {error}") from None


def copy_checked(source: IO[bytes], target: IO[bytes], size: int, digest: str) -> None:
    """Copy an archive to this node, and check its digest.

    Raises:
        ArchiveError: it isn't what its index says.
    """
    seen, total = hashlib.sha256(), 0
    while data := source.read(_CHUNK):
        total += len(data)
        if total > size:
            break
        seen.update(data)
        target.write(data)
    if total != size or seen.hexdigest() != digest:
        raise ArchiveError(f"it has other bytes than its index says (expected {size} with SHA-256 {digest[:16]}…)")
    target.flush()


class _Digesting:
    """A file that is only written, with a digest of what was."""

    def __init__(self, target: IO[bytes], update: object) -> None:
        self._target, self._update = target, update

    def write(self, data: bytes) -> int:
        self._update(data)  # type: ignore[operator]  # hashlib has no public type for its objects before 3.13
        return self._target.write(data)


def _write(folder: str, contents: Contents, target: _Digesting) -> None:
    facts = {_HOME: folder, _CPU: cpu_kind()}
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, pax_headers=facts) as archive:  # type: ignore[call-overload]  # it only writes
        folders: set[str] = set()
        for path, (size, mtime_ns) in contents.files.items():
            parent = os.path.dirname(path)
            for depth in range(parent.count("/") + 1 if parent else 0):
                above = "/".join(parent.split("/")[: depth + 1])
                if above not in folders:
                    folders.add(above)
                    archive.addfile(_member(above, 0, 0o700, tarfile.DIRTYPE))
            descriptor = os.open(os.path.join(folder, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if status.st_size < size:
                    raise FileNotFoundError(path)
                member = _member(path, size, 0o700 if status.st_mode & stat.S_IXUSR else 0o600, tarfile.REGTYPE)
                member.pax_headers = {_TIME: str(mtime_ns)}
                archive.addfile(member, file)


def _member(path: str, size: int, mode: int, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode, member.type = size, mode, kind
    return member


def _checked(member: tarfile.TarInfo, folder: str) -> str:
    """Return the path of a member that may be unpacked."""
    path = member.name
    parts = path.split("/")
    is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and not member.issparse()
    if not is_plain or member.size < 0 or not path or "\0" in path or {"", ".", ".."} & set(parts) or parts[0] == LOCK:
        raise ArchiveError(f"it has {sanitize(path, _MOST_SHOWN)!r}, which is no regular file or folder below its own")
    if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4 and newer
        try:
            tarfile.data_filter(member, folder)
        except tarfile.FilterError as error:
            raise ArchiveError(f"it has {sanitize(path, _MOST_SHOWN)!r}: {error}") from None
    return path


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, homes: tuple[str, str]) -> None:
    mtime_ns = int(member.pax_headers.get(_TIME, "0"))
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    mode = 0o700 if member.mode & stat.S_IXUSR else 0o600
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    source = archive.extractfile(member)
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        while source is not None and (data := source.read(_CHUNK)):
            if os.path.basename(path).startswith(_GROUP) and member.size <= _MOST_GROUP_BYTES:
                old, new = (json.dumps(f"{home}/")[1:-1].encode() for home in homes)
                data = data.replace(old, new)
            file.write(data)
        file.flush()
        os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))


def _walk(folder: str, below: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(os.path.join(folder, below)) as entries:
        names = sorted(entries, key=lambda entry: entry.name)
    for entry in names:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_symlink() or entry.name in _LEFT_OUT or entry.name.startswith((LOCK, "tmp.pid_")):
            continue
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir():
                yield from _walk(folder, path)
                continue
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and not entry.name.endswith(".lock"):
                yield path, status


def _is_json(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False
