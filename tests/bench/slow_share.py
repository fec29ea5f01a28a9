# SPDX-License-Identifier: Apache-2.0
"""A slow shared file system for tests: one folder, read-only, mounted by FUSE on several hosts, with one rate for all and one for each.

This process serves all mounts and counts the bytes that are read. A host mounts with ``python slow_share.py SOCKET MOUNTPOINT``: it opens
/dev/fuse, mounts, and hands the descriptor over. Each mount is a file system of its own, so no host profits from another's page cache. The
protocol is the kernel's (``linux/fuse.h``, version 7.31); no library is needed, so that it runs wherever /dev/fuse does.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_IN = struct.Struct("=IIQQIIII")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI7I")
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 36, 38, 42
_SILENT = (FORGET, BATCH_FORGET, INTERRUPT)
_ASYNC_READ, _MAX_PAGES, _PARALLEL_DIROPS = 1 << 0, 1 << 22, 1 << 18
# as NFS: what is cached of a file is dropped when its time has changed
_AUTO_INVAL_DATA = 1 << 12
_KEEP_CACHE = 2
_PAGES = 256
_BUFFER_BYTES = (1 << 20) + (1 << 16)
_THREADS = 24
_VALID_SECONDS = 1
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4


class TokenBucket:
    """Limits a rate; who takes waits for its turn. Thread-safe.

    Args:
        rate: bytes a second; 0 for no limit.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until ``count`` bytes are allowed."""
        if not self.rate:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + count / self.rate
            wait = self._free - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class SlowShare:
    """Serves a folder.

    Args:
        folder: the folder; it may change meanwhile.
        rate: bytes a second for all mounts together; 0 for no limit.
        mount_rate: bytes a second for each.
        open_seconds: how long each opening of a file takes.
    """

    def __init__(self, folder: Path, rate: float = 0, mount_rate: float = 0, open_seconds: float = 0) -> None:
        self.folder, self.open_seconds, self.mount_rate = folder, open_seconds, mount_rate
        self.bucket = TokenBucket(rate)
        self.bytes_read = 0
        self.broken: set[str] = set()
        """Names of files whose second half can't be read."""
        self._count = threading.Lock()
        self._devices: list[int] = []

    def serve(self, listener: socket.socket) -> None:
        """Serve the mounts that are handed over on a listening Unix socket, in threads."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def reset(self) -> int:
        """Return the bytes read since the last call."""
        with self._count:
            count, self.bytes_read = self.bytes_read, 0
        return count

    def _accept(self, listener: socket.socket) -> None:
        while True:
            with listener.accept()[0] as connection:
                _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
                (device,) = array.array("i", ancillary[0][2])
                mount = _Mount(self, device, TokenBucket(self.mount_rate))
                for _ in range(_THREADS):
                    threading.Thread(target=mount.run, daemon=True).start()
                connection.sendall(b"\1")

    def count(self, size: int) -> None:
        """Count bytes that were read."""
        with self._count:
            self.bytes_read += size


class _Mount:
    """One mount. Its threads read requests until it is unmounted."""

    def __init__(self, share: SlowShare, device: int, bucket: TokenBucket) -> None:
        self._share, self._device, self._bucket = share, device, bucket
        self._paths: dict[int, str] = {1: "."}
        self._numbers: dict[str, int] = {".": 1}
        self._lock = threading.Lock()
        self._files: dict[int, str] = {}

    def run(self) -> None:
        while True:
            try:
                request = os.read(self._device, _BUFFER_BYTES)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # unmounted
            _, code, unique, node, *_ = _IN.unpack_from(request)
            if code in _SILENT:
                continue
            try:
                answer, problem = self._handle(code, node, request[_IN.size :]), 0
            except OSError as error:
                answer, problem = b"", -(error.errno or errno.EIO)
            with contextlib.suppress(OSError):  # the request was interrupted
                os.write(self._device, _OUT.pack(_OUT.size + len(answer), problem, unique) + answer)

    def _handle(self, code: int, node: int, body: bytes) -> bytes:
        share = self._share
        if code == INIT:
            major, minor, readahead, _ = struct.unpack_from("=IIII", body)
            flags = _ASYNC_READ | _MAX_PAGES | _PARALLEL_DIROPS | _AUTO_INVAL_DATA
            return _INIT_OUT.pack(major, min(minor, 31), readahead, flags, 64, 48, 1 << 17, 1, _PAGES, 0, 0, *[0] * 7)
        path = share.folder / self._paths[node]
        if code == LOOKUP:
            return self._entry(os.path.join(self._paths[node], os.fsdecode(body.rstrip(b"\0"))))
        if code == GETATTR:
            return struct.pack("=QII", _VALID_SECONDS, 0, 0) + _attributes(path.stat(), node)
        if code == OPEN:
            time.sleep(share.open_seconds)
            return struct.pack("=QII", os.open(path, os.O_RDONLY), _KEEP_CACHE, 0)
        if code == READ:
            handle, offset, size = struct.unpack_from("=QQI", body)
            if path.name in share.broken and offset >= path.stat().st_size // 2:
                raise OSError(errno.EIO, "broken")
            data = os.pread(handle, size, offset)
            self._bucket.take(len(data))
            share.bucket.take(len(data))
            share.count(len(data))
            return data
        if code == RELEASE:
            os.close(struct.unpack_from("=Q", body)[0])
            return b""
        if code == OPENDIR:
            return struct.pack("=QII", 0, 0, 0)
        if code == READDIR:
            _, offset, size = struct.unpack_from("=QQI", body)
            return b"".join(_fitting(sorted(os.scandir(path), key=lambda entry: entry.name)[offset:], offset, size))
        if code == STATFS:
            return struct.pack("=QQQQQIIII6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *[0] * 6)
        if code in (RELEASEDIR, FLUSH, DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not supported")

    def _entry(self, path: str) -> bytes:
        status = (self._share.folder / path).stat()
        with self._lock:
            node = self._numbers.setdefault(os.path.normpath(path), len(self._numbers) + 1)
            self._paths[node] = os.path.normpath(path)
        return struct.pack("=QQQQII", node, 0, _VALID_SECONDS, _VALID_SECONDS, 0, 0) + _attributes(status, node)


def _attributes(status: os.stat_result, node: int) -> bytes:
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    times = (seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds)
    owner = (status.st_mode, status.st_nlink, 0, 0, 0, 4096, 0)
    return _ATTR.pack(node, status.st_size, status.st_blocks, *times, *owner)


def _fitting(entries: list[os.DirEntry[str]], offset: int, size: int) -> Iterator[bytes]:
    for number, entry in enumerate(entries, offset + 1):
        name = os.fsencode(entry.name)
        kind = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
        record = struct.pack("=QQII", number + 1, number, len(name), kind >> 12) + name
        record += bytes(-len(record) % 8)
        size -= len(record)
        if size < 0:
            return
        yield record


def mount(address: str, mountpoint: str) -> None:
    """Mount the share that is served at a Unix socket."""
    device = os.open("/dev/fuse", os.O_RDWR)
    os.makedirs(mountpoint, exist_ok=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    if libc.mount(b"share", mountpoint.encode(), b"fuse.slowshare", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendmsg([b"\1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [device]))])
        connection.recv(1)


if __name__ == "__main__":
    mount(*sys.argv[1:])
