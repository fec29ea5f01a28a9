# SPDX-License-Identifier: Apache-2.0
"""The part of a node that makes a copy: its readers, and its streams from its predecessor.

The nodes form a ring. An extent is read by one of them, written to its disk, and travels from there once around, each node writing, checking
and forwarding it; so no node sends more than one copy of the model. What is forwarded is sent from the file, so no extent is kept in memory,
and a slow neighbour delays no other node.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.stage.digest import Crc32
from dynamo_mpi.stage.holdings import Holdings
from dynamo_mpi.stage.manifest import SourceChangedError, StageError
from dynamo_mpi.stage.member import Member
from dynamo_mpi.stage.open_files import Source, new_buffer, whole_pages
from dynamo_mpi.stage.wire import pack_number, read_header, send_ready

if TYPE_CHECKING:
    from dynamo_mpi.stage.manifest import Manifest
    from dynamo_mpi.stage.member import Place
    from dynamo_mpi.stage.partial import PartialCopy
    from dynamo_mpi.stage.wire import ExtentHeader, LineChannel

CHUNK_BYTES = 1 << 20
# a network file system splits it into requests that are under way together
_READ_BYTES = 4 << 20
_IDLE_SECONDS = 0.1
_FASTER = 1.5
_MAX_WANTED = 64
_SYNCERS = 2


class Transfer(Member):
    """The part of a node that makes a copy.

    Args:
        place: this node's place.
        manifest: the model.
        copy: this node's copy.
        channel: the connection to the coordinator.
    """

    def __init__(self, place: Place, manifest: Manifest, copy: PartialCopy, channel: LineChannel) -> None:
        super().__init__(place, manifest, copy.files, channel)
        self._holdings = Holdings(manifest, copy)
        self._source = Source(manifest)
        self._reading: set[int] = set()
        self._back: socket.socket | None = None
        self._back_lock = threading.Lock()
        self._pool_empty = False
        self._received_before = 0

    @property
    def size(self) -> int:
        """Bytes of the model that are here."""
        return self._holdings.size

    def digest(self, number: int) -> str:
        """Return the digest of an extent that is here."""
        return self._holdings.digest(number)

    def digests(self) -> tuple[str, ...]:
        """Return the digests of all extents."""
        return self._holdings.digests()

    def start(self) -> None:
        """Start; streams may come before and after."""
        self.run(self._follow)
        for _ in range(_SYNCERS):
            self.run(self._sync)
        for number in range(self._place.readers):
            self.run(self._read_all, number == 0)
        self.run(self._report)
        if not self._manifest.files:
            self._channel.send("complete")

    def add_incoming(self, stream: socket.socket, *, first: bool) -> None:
        """Receive from the predecessor on a stream."""
        self._streams.append(stream)
        send_ready(stream)
        if first:
            self._back = stream
        self.run(self._receive_all, stream)

    def close(self) -> None:
        """End all threads, without waiting."""
        super().close()
        self._holdings.close(_SYNCERS)
        for _ in range(self._place.readers):
            self._grants.put(None)

    # reading

    def _read_all(self, tries: bool) -> None:
        buffer = new_buffer(_READ_BYTES)
        while self._end is None and not self._holdings.is_complete:
            self._channel.send("want", *self._wanted(tries))
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
            if not self.read and not self._reading:
                self._received_before = self.received
            self._reading.add(number)
        digest = Crc32()
        offset, end = extent.offset, extent.offset + extent.length
        try:
            while offset < end:
                if self._end is not None:
                    return
                # at the end of a file, more is asked for than there is
                count = min(self._source.read(extent.file, buffer[: whole_pages(end - offset)], offset), end - offset)
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

    def _wanted(self, tries: bool) -> list[int]:
        """Return extents that this node had rather read by itself: if its predecessor sends less than it has read meanwhile, or nothing.

        Where a node feeds the others, only if nothing arrives: reading less is what it is for.

        Args:
            tries: whether to find out, where this node has hardly read: the others had taken all before it came.
        """
        if not self._pool_empty:
            return []
        with self._lock:
            has_read = self.read >= self._manifest.extent_bytes
            is_slow = self.read >= _FASTER * (self.received - self._received_before) if has_read else tries
            if not (is_slow and not self._place.fed) and not self.is_stalled:
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
        digest = Crc32()
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
        if digest.hexdigest() != header.digest.hex():
            hint = "; --stage-verify digest finds out whether its copy is damaged" if self._place.fed else ""
            raise StageError(
                f"{self._manifest.files[extent.file].path} has arrived damaged from {self._predecessor} "
                f"(bytes {extent.offset} to {end}){hint}"
            )
        self._arrived(header.extent, digest.hexdigest(), header.origin)

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
