# SPDX-License-Identifier: Apache-2.0
"""The first node's server: hands out extents, ends staging for all nodes together, and knows how far each is.

A node publishes its copy only when all nodes have theirs and the model has not changed meanwhile. If a node fails, or its connection closes,
all end.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.stage.manifest import SourceChangedError, StageError, require_all_unchanged
from dynamo_mpi.stage.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.stage.manifest import Manifest
    from dynamo_mpi.stage.wire import LineChannel

JOIN_SECONDS = 30.0
"""How long the nodes may take to connect."""
FAILED, CHANGED = "failed", "changed"
"""How staging ends otherwise: the original folder is used; or an error, as the model has changed."""


class Status(NamedTuple):
    """How far the nodes are.

    Args:
        have: bytes that the slowest node has.
        total: bytes of the model.
        slowest: that node's host.
        read: bytes that all nodes have read from the model's folder.
    """

    have: int
    total: int
    slowest: str
    read: int


class Coordinator:
    """Leads the nodes of one staging. Thread-safe.

    Args:
        manifest: the model.
        hosts: the nodes' names.
        fed: whether the first of them has a copy, from which it feeds the others.
    """

    def __init__(self, manifest: Manifest, hosts: Sequence[str], *, fed: bool = False) -> None:
        self._manifest, self._hosts = manifest, hosts
        self._pool = Pool([extent.length for extent in manifest.extents()], fed=fed)
        self._changed = threading.Condition()
        self._channels: dict[int, LineChannel] = {}
        self._threads: list[threading.Thread] = []
        self._progress = dict.fromkeys(range(len(hosts)), (0, 0))
        self._complete: set[int] = set()
        self._end: tuple[str, ...] | None = None

    def attach(self, node: int, channel: LineChannel) -> None:
        """Serve a node on its connection, in a thread."""
        if not 0 <= node < len(self._hosts):
            channel.close()
            return
        thread = threading.Thread(target=self._serve, args=(node, channel), name="coordinator", daemon=True)
        with self._changed:
            self._channels[node] = channel
            self._threads.append(thread)
            end = self._end
        if end is not None:
            channel.send(*end)
        thread.start()

    def status(self) -> Status:
        """Return how far the nodes are."""
        with self._changed:
            slowest = min(self._progress, key=lambda node: self._progress[node][0])
            read = sum(done for _, done in self._progress.values())
            return Status(self._progress[slowest][0], self._manifest.size, self._hosts[slowest], read)

    def fail(self, kind: str, text: str) -> None:
        """End staging for all nodes.

        Args:
            kind: `FAILED` or `CHANGED`.
            text: why.
        """
        self._finish((kind, text))

    def run(self) -> None:
        """Wait until all nodes have a copy, and let them publish it; or until it has failed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._end is not None or len(self._channels) == len(self._hosts), JOIN_SECONDS
            )
            missing = [host for node, host in enumerate(self._hosts) if node not in self._channels]
        if missing:
            self.fail(FAILED, f"the staging process on {missing[0]} has not connected within {JOIN_SECONDS:g} s")
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None or len(self._complete) == len(self._hosts))
            if self._end is not None:
                return
        try:
            require_all_unchanged(self._manifest)
        except SourceChangedError as error:
            self.fail(CHANGED, str(error))
        except StageError as error:
            self.fail(FAILED, str(error))
        else:
            self._finish(("publish",))

    def join(self, seconds: float) -> None:
        """Wait until the nodes have received how it ends and have closed their connections, at most ``seconds``."""
        end = time.monotonic() + seconds
        for thread in tuple(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _finish(self, end: tuple[str, ...]) -> None:
        with self._changed:
            if self._end is not None:
                return
            self._end = end
            channels = list(self._channels.values())
            self._changed.notify_all()
        for channel in channels:
            channel.send(*end)

    def _serve(self, node: int, channel: LineChannel) -> None:
        try:
            for message in channel.receive():
                self._handle(node, channel, *message)
        except (TypeError, ValueError):
            self.fail(FAILED, f"the staging process on {self._hosts[node]} has sent something invalid")
        self.fail(FAILED, f"the staging process on {self._hosts[node]} has ended")
        channel.close()

    def _handle(self, node: int, channel: LineChannel, kind: str, *rest: Any) -> None:
        if kind == "want":
            with self._changed:
                extent = self._pool.next(node, time.monotonic(), rest)
            channel.send("extent", extent)
        elif kind == "read":
            with self._changed:
                self._pool.done(int(rest[0]), time.monotonic())
        elif kind == "progress":
            have, read = map(int, rest)
            with self._changed:
                self._progress[node] = have, read
        elif kind == "complete":
            with self._changed:
                self._complete.add(node)
                self._changed.notify_all()
        elif kind in (FAILED, CHANGED):
            (text,) = rest
            self.fail(kind, text if len(self._hosts) == 1 else f"{self._hosts[node]}: {text}")
        else:
            raise ValueError(kind)
