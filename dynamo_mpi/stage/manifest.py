# SPDX-License-Identifier: Apache-2.0
"""The files of a model as they are copied: what identifies them, and the extents in which they travel."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.stage.digest import ALGORITHM, EARLIER, digest_of, is_known

MIN_EXTENT, MAX_EXTENT = 8 << 20, 64 << 20
"""Bytes of an extent: smaller ones share out the work better, larger ones need fewer messages."""
_EXTENTS_AIMED_AT = 4096
_KEY_DIGITS = 16
_MAX_FILES = 100_000
_MAX_SHOWN = 300
_HASHERS = 8


class StageError(Exception):
    """Staging isn't possible, or has ended. The text says why; the worker can still load from the original folder."""


class SourceChangedError(StageError):
    """A file of the model has changed since the manifest was made: what was copied may mix two versions."""


class SourceFile(NamedTuple):
    """A file of the model.

    Args:
        path: its path below the model's folder.
        size: bytes.
        mtime_ns: time of its last change, in nanoseconds since 1970.
        blob: the name of the hub's blob that it is a link to; empty if it is none.
    """

    path: str
    size: int
    mtime_ns: int
    blob: str = ""


class Extent(NamedTuple):
    """A part of a file.

    Args:
        file: the file's index in the manifest.
        offset: its first byte.
        length: bytes.
    """

    file: int
    offset: int
    length: int


class Manifest(NamedTuple):
    """A model at one moment.

    Args:
        source: its folder, without links.
        files: its files, sorted by path.
        extent_bytes: the longest extent.
        digests: of each extent, hexadecimal; empty as long as they aren't known.
        algorithm: what they are.
    """

    source: str
    files: tuple[SourceFile, ...]
    extent_bytes: int = MIN_EXTENT
    digests: tuple[str, ...] = ()
    algorithm: str = ALGORITHM

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def folder_name(self) -> str:
        """The name of a copy's folder: the model's name, and a digest of what identifies this version of it."""
        identity = json.dumps([self.source, self.files], separators=(",", ":")).encode("utf-8", "surrogatepass")
        return f"{_name_of(self.source)}-{hashlib.sha256(identity).hexdigest()[:_KEY_DIGITS]}"

    def extents(self) -> list[Extent]:
        """Return all extents, in the files' order."""
        step = self.extent_bytes
        return [
            Extent(number, offset, min(step, file.size - offset))
            for number, file in enumerate(self.files)
            for offset in range(0, file.size, step)
        ]

    @property
    def can_be_checked(self) -> bool:
        """Whether it has digests, of a kind that this version can compute."""
        return len(self.digests) == len(self.extents()) and is_known(self.algorithm)

    def to_json(self) -> str:
        """Encode it."""
        members = self._asdict()
        # earlier versions take digests of this form for none, so that they neither check by them nor send them
        members["digests"] = {members.pop("algorithm"): self.digests}
        return json.dumps(members, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Decode the result of `to_json`.

        Raises:
            ValueError: it isn't a manifest.
        """
        try:
            members = json.loads(text)
            files = tuple(
                SourceFile(str(path), int(size), int(at), str(blob)) for path, size, at, blob in members["files"]
            )
            digests = members["digests"]
            ((algorithm, values),) = ({EARLIER: digests} if isinstance(digests, list) else digests).items()
            return cls(
                str(members["source"]), files, int(members["extent_bytes"]), tuple(map(str, values)), str(algorithm)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error}") from None


def extent_bytes_for(size: int) -> int:
    """Return the length of extents for a model of ``size`` bytes: a power of two of MiB."""
    length = MIN_EXTENT
    while length < MAX_EXTENT and size > length * _EXTENTS_AIMED_AT:
        length *= 2
    return length


def scan(folder: str) -> Manifest:
    """Return the manifest of a model's folder. Hidden files and folders are left out.

    Raises:
        StageError: a file can't be read, is no regular file, or a link leads out of the model's folder.
    """
    source = os.path.realpath(folder)
    inside = _allowed_root(source)
    files: list[SourceFile] = []
    try:
        _scan_folder(source, "", inside, files)
    except OSError as error:
        raise StageError(f"{_shown(error.filename or source)} can't be read: {error.strerror}") from None
    files.sort()
    return Manifest(source, tuple(files), extent_bytes_for(sum(file.size for file in files)))


def require_unchanged(path: str, file: SourceFile, status: os.stat_result) -> None:
    """Check that a file of the model is as the manifest has it.

    Raises:
        SourceChangedError: it isn't.
    """
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        what = f"{file.size} bytes before, {status.st_size} now" if status.st_size != file.size else "by its time"
        raise SourceChangedError(f"{_shown(path)} has changed while it was copied ({what})")


def require_all_unchanged(manifest: Manifest) -> None:
    """Check that all files of the model are as the manifest has them, and that there are no others.

    Raises:
        SourceChangedError: they aren't.
        StageError: they can't be read any more.
    """
    now = {file.path: file for file in scan(manifest.source).files}
    then = {file.path: file for file in manifest.files}
    for path in sorted(now.keys() | then.keys()):
        if now.get(path) != then.get(path):
            what = "is new" if path not in then else "is gone" if path not in now else "has changed"
            raise SourceChangedError(f"{_shown(os.path.join(manifest.source, path))} {what} since staging began")


def has_digests(folder: str, manifest: Manifest) -> bool:
    """Read all files of a copy, and return whether their extents have the digests that were computed when they were copied."""
    if not manifest.can_be_checked:
        return False
    extents = manifest.extents()

    def is_right(number: int) -> bool:
        file, offset, length = extents[number]
        try:
            with open(os.path.join(folder, manifest.files[file].path), "rb", buffering=0) as stream:
                return digest_of(stream.fileno(), offset, length, manifest.algorithm) == manifest.digests[number]
        except OSError:
            return False

    with ThreadPoolExecutor(min(_HASHERS, os.cpu_count() or 1)) as pool:
        return all(pool.map(is_right, range(len(extents))))


def _scan_folder(source: str, below: str, inside: str, files: list[SourceFile]) -> None:
    with os.scandir(os.path.join(source, below)) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name.startswith("."):
                continue
            path = os.path.join(below, entry.name)
            blob = ""
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if target != inside and not _is_below(target, inside):
                    raise StageError(
                        f"{_shown(entry.path)} is a link that leaves the model's folder, to {_shown(target)}"
                    )
                if os.path.basename(os.path.dirname(target)) == "blobs":
                    blob = os.path.basename(target)
            if entry.is_dir():
                if entry.is_symlink():
                    raise StageError(f"{_shown(entry.path)} is a link to a folder")
                _scan_folder(source, path, inside, files)
                continue
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):
                raise StageError(f"{_shown(entry.path)} is no regular file")
            files.append(SourceFile(path, status.st_size, status.st_mtime_ns, blob))
            if len(files) > _MAX_FILES:
                raise StageError(f"{_shown(source)} has more than {_MAX_FILES} files: it is no model's folder")


def _allowed_root(source: str) -> str:
    """Return the folder that links may not leave: the hub's folder of the model, for one of its snapshots."""
    snapshots = os.path.dirname(source)
    model = os.path.dirname(snapshots)
    is_snapshot = os.path.basename(snapshots) == "snapshots" and os.path.basename(model).startswith("models--")
    return model if is_snapshot else source


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _name_of(source: str) -> str:
    root = os.path.basename(_allowed_root(source))
    return re.sub(r"[^A-Za-z0-9._-]", "_", root.removeprefix("models--"))[:100].lstrip(".") or "model"


def _shown(path: str) -> str:
    return sanitize(path, _MAX_SHOWN)
