# SPDX-License-Identifier: Apache-2.0
"""The archives of compile caches on the shared file system: ``DIR/dynamo-mpi-UID/NAME/``, NAME with a digest of the key.

    index.json      the key in full, and for each rank its file's digest; replaced as a whole, by rank 0 of one worker
    DIGEST.tar      one rank's files, by the digest of its bytes; written under another name, then renamed
    .begun-WORKER   a worker starts with it, and doesn't serve yet

No lock is needed, which not all shared file systems have: files are never changed, and the last index counts. The one before stays valid
until the next is written. All of it is code that ranks will run: a folder or file that anybody but this user or root could have written
is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.folder_walk import require_root_s, user_folder, user_number
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.stage.cache_archive import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

INDEX, PREVIOUS = "index.json", "previous.json"
_ROOT = "dynamo-mpi-0"
_SUFFIX = ".tar"
_TEMPORARY = ".part-"
_BEGUN = ".begun-"
_VERSION = 1
_MAX_INDEX_BYTES = 16 << 20
_ORPHAN_SECONDS = 3600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Part(NamedTuple):
    """One rank's file.

    Args:
        digest: SHA-256 of its bytes, hexadecimal.
        size: its bytes.
        files: the files in it.
    """

    digest: str
    size: int
    files: int


class Found(NamedTuple):
    """An archive for all ranks.

    Args:
        folder: where it is.
        parts: its files, by rank.
    """

    folder: str
    parts: tuple[Part, ...]


def name_of(model: str, key: Mapping[str, Any]) -> str:
    """Return the name of the archive for a key: readable, and with a digest of all of it."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(model.rstrip("/")))[:60].lstrip(".")
    return f"{label or 'model'}-{digest}"


def folders_of(directory: str, name: str) -> tuple[str, ...]:
    """Return where an archive may be: this user's own, then one that root has made for all."""
    return tuple(os.path.join(directory, user, name) for user in dict.fromkeys((user_folder(), _ROOT)))


def look(path: str, key: Mapping[str, Any], ranks: int) -> Found | None:
    """Return the archive in a folder; None if there is none.

    Raises:
        ArchiveError: its index is of something else.
        UnsafeFileError: others could have written it.
        OSError: it can't be read.
    """
    try:
        with _open(path) as folder:
            parts, written_for = _parts_of(folder.read(INDEX, _MAX_INDEX_BYTES))
    except FileNotFoundError:
        return None
    if written_for != json.loads(json.dumps(key)) or len(parts) != ranks:
        raise ArchiveError(f"{path}/{INDEX} is of another engine, GPU, driver, model or layout")
    return Found(path, parts)


def _open(path: str, *, create: bool = False) -> OwnFolder:
    """Open an archive's folder, which must be in one of this user's own or root's."""
    folder = OwnFolder(path, sole=True, create=create, mode=0o755 if _is_for_all() else 0o700)
    try:
        above = os.path.dirname(path)
        if os.path.basename(above) == _ROOT != user_folder():
            require_root_s(above)
        else:
            with OwnFolder(above, sole=True) as own:
                own.require_own()
    except OSError:
        folder.close()
        raise
    return folder


def _is_for_all() -> bool:
    """Return whether other users shall read what this one writes: root's archives have no secrets, and are for all."""
    return user_number() == 0


def _file_mode() -> int:
    return 0o644 if _is_for_all() else 0o600


def read_part(path: str, part: Part, use: Callable[[IO[bytes]], object]) -> None:
    """Call ``use`` with an open part.

    Raises:
        UnsafeFileError: others could have written it.
        OSError: it can't be read.
    """
    with _open(path) as folder:
        descriptor = folder.open(f"{part.digest}{_SUFFIX}", os.O_RDONLY)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        use(file)


def write_part(path: str, write: Callable[[IO[bytes]], tuple[str, int]]) -> Part:
    """Write one rank's file; it is stored before it has its name.

    Args:
        path: the archive's folder, created if it is missing.
        write: called with the open file; returns its digest and the number of files in it.

    Raises:
        UnsafeFileError: others could write there.
        OSError: it can't be written.
    """
    with _open(path, create=True) as folder:
        temporary = f"{_TEMPORARY}{os.urandom(8).hex()}"
        descriptor = folder.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, _file_mode())
        try:
            with os.fdopen(descriptor, "w+b") as file:
                digest, files = write(file)
                file.flush()
                os.fsync(descriptor)
                size = os.fstat(descriptor).st_size
            folder.rename(temporary, f"{digest}{_SUFFIX}")
        except BaseException:
            folder.remove(temporary)
            raise
    return Part(digest, size, files)


def note_start(path: str, worker: str) -> None:
    """Note that a worker starts with this archive, until `forget_start`. Where it can't be written, `may_have_failed` is true anyway."""
    with contextlib.suppress(OSError), _open(path) as folder:
        folder.write(f"{_BEGUN}{worker}", b"")


def forget_start(path: str, worker: str) -> None:
    """Remove what `note_start` wrote: the worker serves."""
    with contextlib.suppress(OSError), _open(path) as folder:
        folder.remove(f"{_BEGUN}{worker}")


def may_have_failed(path: str, worker: str) -> bool:
    """Return whether an earlier start of a worker with this archive didn't come to serve, or that can't be known."""
    return not os.access(path, os.W_OK) or os.path.lexists(os.path.join(path, f"{_BEGUN}{worker}"))


def discard(path: str, digests: Sequence[str]) -> int:
    """Remove files that were written for an archive that isn't published, and those that killed processes have left; return how many.

    Raises:
        UnsafeFileError: others could write there.
        OSError: it can't be read.
    """
    with _open(path) as folder:
        return _remove_orphans(path, folder, _named(folder), set(digests))


def publish(path: str, key: Mapping[str, Any], parts: Sequence[Part]) -> int:
    """Make the ranks' files the archive for this key, at once; return how many files were removed that no index names any more.

    Raises:
        ArchiveError: a file is gone: one that a rank wanted to keep may have been removed since.
        UnsafeFileError: others could write there.
        OSError: it can't be written.
    """
    index = {"version": _VERSION, "at": time.time(), "key": key, "parts": [list(part) for part in parts]}
    with _open(path, create=True) as folder:
        for part in parts:
            _require_whole(path, folder, part)
        with contextlib.suppress(OSError):
            # a worker that starts now may still read the files of this one
            folder.write(PREVIOUS, folder.read(INDEX, _MAX_INDEX_BYTES), _file_mode())
        folder.write(INDEX, json.dumps(index).encode(), _file_mode(), sync=True)
        return _remove_orphans(path, folder, _named(folder))


def _require_whole(path: str, folder: OwnFolder, part: Part) -> None:
    name = f"{part.digest}{_SUFFIX}"
    try:
        descriptor = folder.open(name, os.O_RDONLY)
    except FileNotFoundError:
        raise ArchiveError(f"{path}/{name} is gone") from None
    try:
        if (size := os.fstat(descriptor).st_size) != part.size:
            raise ArchiveError(f"{path}/{name} has {size} bytes, not {part.size}")
    finally:
        os.close(descriptor)


def _named(folder: OwnFolder) -> set[str]:
    """Return the digests that an index names."""
    named: set[str] = set()
    for index in (INDEX, PREVIOUS):
        with contextlib.suppress(OSError, ArchiveError):
            named |= {part.digest for part in _parts_of(folder.read(index, _MAX_INDEX_BYTES))[0]}
    return named


def _remove_orphans(path: str, folder: OwnFolder, kept: set[str], failed: Container[str] = ()) -> int:
    removed = 0
    for name in folder.names():
        digest = name.removesuffix(_SUFFIX)
        is_part = name.endswith(_SUFFIX) and digest not in kept
        if not (is_part or name.startswith((_TEMPORARY, _BEGUN, f".{INDEX}."))):
            continue
        with contextlib.suppress(OSError):
            # a younger one may be of a worker that is about to write its index
            if digest in failed or time.time() - os.lstat(os.path.join(path, name)).st_mtime > _ORPHAN_SECONDS:
                folder.remove(name)
                removed += 1
    return removed


def _parts_of(content: bytes) -> tuple[tuple[Part, ...], Any]:
    try:
        index = json.loads(content)
        if index["version"] != _VERSION:
            raise ValueError
        parts = tuple(Part(str(digest), int(size), int(files)) for digest, size, files in index["parts"])
        if not all(_DIGEST.fullmatch(part.digest) and part.size >= 0 for part in parts):
            raise ValueError
        return parts, index["key"]
    except (ValueError, KeyError, TypeError):
        raise ArchiveError(f"its {INDEX} is no index of this version") from None
