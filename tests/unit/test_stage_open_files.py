# SPDX-License-Identifier: Apache-2.0
"""A model is read past the page cache where its file system can, and all of it in any case."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_mpi.stage.manifest import SourceChangedError, scan
from dynamo_mpi.stage.open_files import Source, new_buffer, whole_pages

CONTENT = os.urandom(3 * mmap.PAGESIZE + 5)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A model on what counts as a shared file system."""
    monkeypatch.setattr("dynamo_mpi.stage.open_files.file_system_type", lambda _: "lustre")
    (tmp_path / "weights").write_bytes(CONTENT)
    return Source(scan(str(tmp_path)))


def read_all(source: Source, step: int = 2 * mmap.PAGESIZE) -> bytes:
    """Read the file in steps."""
    buffer, data = new_buffer(step), b""
    while count := source.read(0, buffer, len(data)):
        data += bytes(buffer[:count])
    return data


def is_direct(source: Source) -> bool:
    return bool(fcntl.fcntl(source.descriptor(0), fcntl.F_GETFL) & os.O_DIRECT)


def test_a_file_is_read_to_its_end_whose_last_part_is_no_whole_page(source: Source) -> None:
    assert [whole_pages(size) for size in (1, mmap.PAGESIZE, mmap.PAGESIZE + 1)] == [
        mmap.PAGESIZE,
        mmap.PAGESIZE,
        2 * mmap.PAGESIZE,
    ]
    assert read_all(source) == CONTENT
    source.close()


def test_only_a_shared_file_system_is_read_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(CONTENT)
    asked = list[int]()
    open_it = os.open

    def note(path: str, flags: int, *rest: int) -> int:
        asked.append(flags & os.O_DIRECT)
        return open_it(path, flags & ~os.O_DIRECT, *rest)

    monkeypatch.setattr(os, "open", note)
    for kind, flag in (("nfs4", os.O_DIRECT), ("fuse.share", os.O_DIRECT), ("ext4", 0), ("tmpfs", 0), ("", 0)):
        monkeypatch.setattr("dynamo_mpi.stage.open_files.file_system_type", lambda _, kind=kind: kind)
        assert read_all(Source(scan(str(tmp_path)))) == CONTENT
        assert asked == [flag]
        asked.clear()


def test_a_file_system_that_reads_through_the_page_cache_only_is_read_so(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_it(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert not is_direct(source)
    assert read_all(source) == CONTENT


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_only_the_reading_is_read_through_the_page_cache(
    source: Source, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    read_it, refused = os.preadv, list[int]()

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(number, os.strerror(number))
        return read_it(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert read_all(source) == CONTENT
    assert refused == [0], "it is tried once for each file"


def test_after_less_than_was_asked_for_it_goes_on_between_two_blocks(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_it = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, buffers, offset: min(read_it(descriptor, buffers, offset), 777)
    )
    assert read_all(source) == CONTENT


def test_another_error_is_no_reason_to_try_again(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[int]()

    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        tries.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source.read(0, new_buffer(mmap.PAGESIZE), 0)
    assert tries == [0]


def test_a_file_that_has_changed_is_not_read(source: Source, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(CONTENT + b"more")
    with pytest.raises(SourceChangedError, match="weights has changed"):
        source.read(0, new_buffer(mmap.PAGESIZE), 0)


def test_a_model_that_is_gone_is_an_error_of_the_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(CONTENT)
    manifest = scan(str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    source = Source(manifest)
    with pytest.raises(FileNotFoundError, match="weights"):
        source.read(0, new_buffer(mmap.PAGESIZE), 0)
