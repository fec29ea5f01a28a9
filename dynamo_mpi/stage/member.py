# SPDX-License-Identifier: Apache-2.0
"""What every node of the ring does: follows the coordinator, and sends extents of its copy to its successor.

A node that had a copy before the others feeds them: it is the first of the ring, sends all of it, and receives nothing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.stage.coordinator import CHANGED, FAILED
from dynamo_mpi.stage.manifest import SourceChangedError, StageError
from dynamo_mpi.stage.wire import ExtentHeader, await_ready, read_number, shut

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.stage.manifest import Manifest
    from dynamo_mpi.stage.open_files import OpenFiles
    from dynamo_mpi.stage.wire import LineChannel

_STALLED_SECONDS = 5.0
_REPORT_SECONDS = 0.5
_ANSWER_SECONDS = 2.0


class Place(NamedTuple):
    """A node's place in the ring.

    Args:
        node: its number.
        hosts: all nodes' names.
        readers: how many extents it reads at once.
        fed: whether the first node has a copy, from which it feeds the others.
        leader: the host of the coordinator.
    """

    node: int
    hosts: tuple[str, ...]
    readers: int
    fed: bool
    leader: str

    @property
    def successor(self) -> int:
        """The node to which it sends; its own number if that is none."""
        following = (self.node + 1) % len(self.hosts)
        return self.node if self.fed and following == 0 else following


class Member(ABC):
    """One node's part of one staging.

    Args:
        place: this node's place.
        manifest: the model.
        files: the files of this node's copy.
        channel: the connection to the coordinator.
    """

    def __init__(self, place: Place, manifest: Manifest, files: OpenFiles, channel: LineChannel) -> None:
        self._place, self._manifest, self._files, self._channel = place, manifest, files, channel
        self._extents = manifest.extents()
        self._lock = threading.Condition()
        self._needless: set[int] = set()
        self._outbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._grants: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._streams: list[socket.socket] = []
        self._end: tuple[str, ...] | None = None
        self._samples: deque[int] = deque(maxlen=int(_STALLED_SECONDS / _REPORT_SECONDS))
        self.read = self.received = self.sent = 0

    @property
    def is_stalled(self) -> bool:
        """Whether nothing has been received for some seconds."""
        return self._samples.maxlen == len(self._samples) and self._samples[0] == self.received

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the model that are here."""

    @abstractmethod
    def digest(self, number: int) -> str:
        """Return the digest of an extent that is here."""

    @abstractmethod
    def start(self) -> None:
        """Start; streams may come before and after."""

    def add_outgoing(self, stream: socket.socket, *, first: bool) -> None:
        """Send to the successor on a stream; the first also brings back what it needs no more."""
        self._streams.append(stream)
        self.run(self._send_all, stream, first)

    def wait(self, seconds: float) -> tuple[str, ...]:
        """Return how it has ended: ``("publish",)``, or the kind and the reason of the failure.

        Args:
            seconds: the time limit.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._end is not None, max(0.0, seconds))
            return self._end or (
                FAILED,
                f"the model was not copied within the time limit ({self.size} bytes were)",
            )

    def close(self) -> None:
        """End all threads, without waiting."""
        self._finish((FAILED, "closed"))
        for stream in self._streams:
            shut(stream)
        for _ in range(len(self._streams) + 1):
            self._outbox.put(None)

    def figures(self) -> dict[str, Any]:
        """Return what this node has read, received and sent, in bytes."""
        return {"read_bytes": self.read, "received_bytes": self.received, "sent_bytes": self.sent}

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
        self._finish((FAILED, f"the staging process on {self._place.leader} has ended"))

    def _report(self) -> None:
        while self._end is None:
            self._channel.send("progress", self.size, self.read)
            self._samples.append(self.received)
            time.sleep(_REPORT_SECONDS)

    def _send_all(self, stream: socket.socket, first: bool) -> None:
        successor = self._place.hosts[self._place.successor]
        try:
            await_ready(stream)
            if first:
                self.run(self._listen_back, stream)
            while (entry := self._outbox.get()) is not None:
                if entry[0] not in self._needless:
                    self._send_one(stream, *entry)
        except OSError as error:
            if self._end is None:
                raise StageError(f"the connection to {successor} is lost: {error.strerror or error}") from None

    def _send_one(self, stream: socket.socket, number: int, origin: int) -> None:
        extent = self._extents[number]
        stream.sendall(ExtentHeader(number, extent.length, origin, bytes.fromhex(self.digest(number))).pack())
        descriptor = self._files.descriptor(extent.file)
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            sent = os.sendfile(stream.fileno(), descriptor, offset, end - offset)
            if not sent:
                raise StageError(f"{self._files.path(extent.file)} has become shorter while it was sent")
            offset += sent
            with self._lock:
                self.sent += sent

    def _listen_back(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the thread that sends on it notices too
            while (number := read_number(stream)) is not None:
                self._needless.add(number)


class Feeder(Member):
    """The first node of a ring, which has a copy already.

    Args:
        place: this node's place.
        manifest: the model, with the digests of its extents.
        files: the files of the copy.
        channel: the connection to the coordinator.
    """

    @property
    def size(self) -> int:
        """Bytes of the model that are here."""
        return self._manifest.size

    def digest(self, number: int) -> str:
        """Return the digest of an extent."""
        return self._manifest.digests[number]

    def start(self) -> None:
        """Start; streams may come before and after."""
        self.run(self._follow)
        self.run(self._report)
        for number in range(len(self._extents)):
            self._outbox.put((number, self._place.node))
        self._channel.send("complete")
