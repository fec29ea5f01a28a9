# SPDX-License-Identifier: Apache-2.0
"""A node's part in staging: its readers, and its streams from its predecessor and to its successor.

The nodes form a ring. An extent is read by one of them, written to its disk, and travels from there once around, each node writing, checking
and forwarding it; so no node sends more than one copy of the model. What is forwarded is sent from the file, so no extent is kept in memory,
and a slow neighbour delays no other node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.stage.coordinator import CHANGED, FAILED
from dynamo_mpi.stage.holdings import Holdings
from dynamo_mpi.stage.manifest import SourceChangedError, StageError
from dynamo_mpi.stage.partial import OpenFiles
from dynamo_mpi.stage.wire import ExtentHeader, pack_number, read_header, read_number, shut

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.stage.manifest import Manifest
    from dynamo_mpi.stage.partial import PartialCopy
    from dynamo_mpi.stage.wire import LineChannel

CHUNK_BYTES = 1 << 20
_IDLE_SECONDS = 0.1
_REPORT_SECONDS = 0.5
_ANSWER_SECONDS = 2.0
_STALLED_SECONDS = 5.0
_FASTER = 1.5
_MAX_WANTED = 64
_SYNCERS = 2


class Place(NamedTuple):
    """A node's place in the ring.

    Args:
        node: its number.
        hosts: all nodes' names.
        readers: how many extents it reads at once.
    """

    node: int
    hosts: tuple[str, ...]
    readers: int

    @property
    def successor(self) -> int:
        """The node to which it sends."""
        return (self.node + 1) % len(self.hosts)


class Transfer:
    """One node's part of one staging.

    Args:
        place: this node's place.
        manifest: the model.
        copy: this node's copy.
        channel: the connection to the coordinator.
    """

    def __init__(self, place: Place, manifest: Manifest, copy: PartialCopy, channel: LineChannel) -> None:
        self._place, self._manifest, self._copy, self._channel = place, manifest, copy, channel
        self._holdings = Holdings(manifest, copy)
        self._source = OpenFiles(manifest.source, manifest, os.O_RDONLY, check=True)
        self._lock = threading.Condition()
        self._reading: set[int] = set()
        self._needless: set[int] = set()
        self._outbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._grants: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._back: socket.socket | None = None
        self._back_lock = threading.Lock()
        self._streams: list[socket.socket] = []
        self._end: tuple[str, ...] | None = None
        self._pool_empty = False
        self._samples: deque[int] = deque(maxlen=int(_STALLED_SECONDS / _REPORT_SECONDS))
        self.read = self.received = self.sent = 0

    def start(self) -> None:
        """Start the readers; streams may come before and after."""
        self.run(self._follow)
        for _ in range(_SYNCERS):
            self.run(self._sync)
        for _ in range(self._place.readers):
            self.run(self._read_all)
        self.run(self._report)
        if not self._manifest.files:
            self._channel.send("complete")

    def add_outgoing(self, stream: socket.socket, *, first: bool) -> None:
        """Send to the successor on a stream; the first also brings back what it needs no more."""
        self._streams.append(stream)
        self.run(self._send_all, stream)
        if first:
            self.run(self._listen_back, stream)

    def add_incoming(self, stream: socket.socket, *, first: bool) -> None:
        """Receive from the predecessor on a stream."""
        self._streams.append(stream)
        if first:
            self._back = stream
        self.run(self._receive_all, stream)

    def wait(self, seconds: float) -> tuple[str, ...]:
        """Return how it has ended: ``("publish",)``, or the kind and the reason of the failure.

        Args:
            seconds: the time limit.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._end is not None, max(0.0, seconds))
            return self._end or (
                FAILED,
                f"the model was not copied within the time limit ({self._holdings.size} bytes were)",
            )

    def digests(self) -> tuple[str, ...]:
        """Return the digests of all extents."""
        return self._holdings.digests()

    def close(self) -> None:
        """End all threads, without waiting."""
        self._finish((FAILED, "closed"))
        for stream in self._streams:
            shut(stream)
        for _ in range(len(self._streams) + 1):
            self._outbox.put(None)
        self._holdings.close(_SYNCERS)
        for _ in range(self._place.readers):
            self._grants.put(None)

    # threads

    def run(self, act: Callable[..., object], *arguments: object) -> None:
        """Run something in a thread; an error in it ends staging, for all nodes."""
        threading.Thread(target=self._run, args=(act, *arguments), name="stage", daemon=True).start()

    def _run(self, act: Callable[..., object], *arguments: object) -> None:
        try:
            act(*arguments)
        except SourceChangedError as error:
            self._fail(CHANGED, str(error))
        except StageError as error:
            self._fail(FAILED, str(error))
        except Exception as error:  # any error ends staging, for all nodes
            self._fail(FAILED, f"{type(error).__name__}: {error}")

    def _fail(self, kind: str, text: str) -> None:
        if self._end is None:
            self._channel.send(kind, text)
            # the coordinator answers with the first failure of all; if it is gone, this one counts
            with self._lock:
                self._lock.wait_for(lambda: self._end is not None, _ANSWER_SECONDS)
            self._finish((kind, text))

    def _finish(self, end: tuple[str, ...]) -> None:
        with self._lock:
            if self._end is None:
                self._end = end
                self._lock.notify_all()

    def _follow(self) -> None:
        for message in self._channel.receive():
            if message[0] == "extent":
                self._grants.put(message[1])
            else:
                self._finish(tuple(map(str, message)))
        self._finish((FAILED, f"the staging process on {self._place.hosts[0]} has ended"))

    def _report(self) -> None:
        while self._end is None:
            self._channel.send("progress", self._holdings.size, self.read)
            self._samples.append(self.received)
            time.sleep(_REPORT_SECONDS)

    # reading

    def _read_all(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while self._end is None and not self._holdings.is_complete:
            self._channel.send("want", *self._wanted())
            number = self._grants.get()
            if number is None or not 0 <= number < len(self._holdings.extents):
                self._pool_empty = True
                time.sleep(_IDLE_SECONDS)
                continue
            self._read_one(number, buffer)

    def _read_one(self, number: int, buffer: memoryview) -> None:
        extent = self._holdings.extent(number)
        if self._pool_empty and not self._holdings.has(number):
            self._need_no_more(number)
        with self._lock:
            self._reading.add(number)
        digest = hashlib.sha256()
        offset, end = extent.offset, extent.offset + extent.length
        try:
            descriptor = self._source.descriptor(extent.file)
            while offset < end:
                if self._end is not None:
                    return
                count = os.preadv(descriptor, [buffer[: end - offset]], offset)
                if not count:
                    raise SourceChangedError(f"{self._source.path(extent.file)} has become shorter while it was copied")
                digest.update(buffer[:count])
                with self._lock:
                    self.read += count
                if not self._holdings.write(number, offset, buffer[:count]):
                    break  # it has arrived meanwhile
                offset += count
            self._source.require_unchanged(extent.file)
        except OSError as error:
            raise StageError(f"{self._source.path(extent.file)} can't be read: {error.strerror}") from None
        finally:
            with self._lock:
                self._reading.discard(number)
        self._channel.send("read", number)
        if offset == end:
            self._need_no_more(number)
            self._arrived(number, digest.hexdigest(), self._place.node)

    def _wanted(self) -> list[int]:
        """Return extents that this node had rather read by itself: if its predecessor sends less than it has read, or nothing."""
        if not self._pool_empty:
            return []
        with self._lock:
            is_stalled = self._samples.maxlen == len(self._samples) and self._samples[0] == self.received
            if self.read < _FASTER * self.received and not is_stalled:
                return []
            return self._holdings.missing(self._reading, _MAX_WANTED)

    # from and to the neighbours

    def _receive_all(self, stream: socket.socket) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            while (header := read_header(stream)) is not None:
                self._receive_one(stream, header, buffer)
        except OSError as error:
            if self._end is None:
                raise StageError(
                    f"the connection from {self._predecessor} is lost: {error.strerror or error}"
                ) from None
            return
        if self._end is None:
            raise StageError(f"the connection from {self._predecessor} has closed")

    def _receive_one(self, stream: socket.socket, header: ExtentHeader, buffer: memoryview) -> None:
        extents = self._holdings.extents
        if header.extent >= len(extents) or header.length != extents[header.extent].length:
            raise StageError(f"{self._predecessor} has sent something invalid")
        extent = extents[header.extent]
        offset, end, known = extent.offset, extent.offset + extent.length, self._holdings.has(header.extent)
        digest = hashlib.sha256()
        while offset < end:
            count = stream.recv_into(buffer[: end - offset], 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionError("it has closed in the middle of an extent")
            with self._lock:
                self.received += count
            if not known:
                digest.update(buffer[:count])
                known = not self._holdings.write(header.extent, offset, buffer[:count])
            offset += count
        if known:
            return
        if digest.digest() != header.digest:
            raise StageError(
                f"{self._manifest.files[extent.file].path} has arrived damaged from {self._predecessor} "
                f"(bytes {extent.offset} to {end})"
            )
        self._arrived(header.extent, digest.hexdigest(), header.origin)

    def _send_all(self, stream: socket.socket) -> None:
        while (entry := self._outbox.get()) is not None:
            number, origin = entry
            if number in self._needless:
                continue
            extent = self._holdings.extent(number)
            header = ExtentHeader(number, extent.length, origin, bytes.fromhex(self._holdings.digest(number)))
            try:
                stream.sendall(header.pack())
                descriptor = self._copy.files.descriptor(extent.file)
                offset, end = extent.offset, extent.offset + extent.length
                while offset < end:
                    sent = os.sendfile(stream.fileno(), descriptor, offset, end - offset)
                    offset += sent
                    with self._lock:
                        self.sent += sent
            except OSError as error:
                if self._end is None:
                    successor = self._place.hosts[self._place.successor]
                    raise StageError(f"the connection to {successor} is lost: {error.strerror or error}") from None
                return

    def _listen_back(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the thread that sends on it notices too
            while (number := read_number(stream)) is not None:
                self._needless.add(number)

    def _need_no_more(self, number: int) -> None:
        if self._back is not None:
            with self._back_lock, contextlib.suppress(OSError):
                self._back.sendall(pack_number(number))

    @property
    def _predecessor(self) -> str:
        return self._place.hosts[self._place.node - 1]

    def _arrived(self, number: int, digest: str, origin: int) -> None:
        if self._holdings.arrived(number, digest) and self._place.successor not in (self._place.node, origin):
            self._outbox.put((number, origin))

    def _sync(self) -> None:
        if self._holdings.sync():
            self._channel.send("progress", self._holdings.size, self.read)
            self._channel.send("complete")

    def figures(self) -> dict[str, Any]:
        """Return what this node has read, received and sent, in bytes."""
        return {"read_bytes": self.read, "received_bytes": self.received, "sent_bytes": self.sent}
