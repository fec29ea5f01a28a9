# SPDX-License-Identifier: Apache-2.0
"""What a process has started is found by its mark or its connection, whatever its parent is, and nothing else is ended; MPICH's leftovers."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_mpi.supervisor import leftovers
from dynamo_mpi.supervisor.leftovers import MARK_VARIABLE, end_descendants, unused_segments


def test_marked_processes_end_wherever_they_stand() -> None:
    marked = {**os.environ, MARK_VARIABLE: "0123abcd"}
    words = [sys.executable, "-c", "import signal; signal.pause()"]
    with (
        subprocess.Popen(words, env=marked, start_new_session=True) as ours,
        subprocess.Popen(words, env={**marked, MARK_VARIABLE: "0123abcde"}) as other,
        subprocess.Popen(words, env=marked) as spared,
    ):
        try:
            assert end_descendants("0123abcd", 0, frozenset({spared.pid})) == [ours.pid]
            assert ours.wait(10) == -9
            assert other.poll() is None
            assert spared.poll() is None
        finally:
            for each in (ours, other, spared):
                each.kill()


def test_forked_processes_are_known_by_the_connection_that_they_hold() -> None:
    near, far = socket.socketpair()
    inode = os.fstat(near.fileno()).st_ino
    words = [sys.executable, "-c", "import signal; signal.pause()"]
    with subprocess.Popen(words, pass_fds=[near.fileno()]) as holder, subprocess.Popen(words) as other:
        try:
            near.close()
            assert end_descendants("", inode) == [holder.pid]
            assert holder.wait(10) == -9
            assert other.poll() is None
        finally:
            holder.kill()
            other.kill()
    far.close()


def test_a_helper_that_ends_by_itself_is_given_a_moment() -> None:
    marked = {**os.environ, MARK_VARIABLE: "89abcdef"}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.1)"], env=marked) as helper:
        assert end_descendants("89abcdef", 0) in ([], [helper.pid])
        assert helper.wait(10) == 0


def test_without_mark_and_connection_nothing_ends() -> None:
    assert end_descendants("", 0) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_shared_memory_that_is_mapped_and_closed_meanwhile_is_in_use(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MPI does in its start; the process may do it before or after its maps are read."""
    (path := tmp_path / "segment").write_bytes(b"x" * mmap.PAGESIZE)
    file, maps, mapped = path.open("r+b"), leftovers._mapped_files, []
    # Python's own mmap keeps a descriptor, which MPI doesn't
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def map_and_close() -> None:
        mapped.append(libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0))
        file.close()

    def read_maps(process: str, start: str) -> set[str]:
        ours = process == f"/proc/{os.getpid()}"
        if ours and moment == "before":
            map_and_close()
        found = maps(process, start)
        if ours and moment == "after":
            map_and_close()
        return found

    monkeypatch.setattr(leftovers, "_mapped_files", read_maps)
    try:
        assert leftovers.paths_in_use(str(tmp_path)) == {str(path)}
    finally:
        (address,) = mapped
        assert libc.munmap(address, mmap.PAGESIZE) == 0


def test_shared_memory_of_mpich_that_no_process_uses_is_found() -> None:
    before = time.time()
    # the kernel's clock for files is a tick behind
    since = before - 0.1
    names = [f"/dev/shm/{prefix}{os.getpid()}" for prefix in ("mpich_shm_", "ucx_shm_posix_", "other_")]
    try:
        for name in names:
            Path(name).touch()
        assert set(names) & unused_segments(since) == set(names[:2])
        with Path(names[0]).open():
            assert set(names) & unused_segments(since) == {names[1]}
        assert not set(names) & unused_segments(before + 60)
    finally:
        for name in names:
            Path(name).unlink()
