# SPDX-License-Identifier: Apache-2.0
"""Which node reads which extent. Pure.

Extents are handed out one by one, so a fast node reads more of them. When all are handed out, those of a slow node are given to another one
as well, and a node that its neighbour serves more slowly than it could read by itself may read what others have read before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOW_FACTOR, SLOW_SECONDS = 3.0, 2.0
"""An extent is given to a second node if reading it takes longer than this many times the mean, and at least this long."""
WAY_FACTOR, WAY_SECONDS = 0.25, 1.0
"""How long a starved node waits for an extent that another one has read: this share of the time since the start, and at least this long."""


class _Reading(NamedTuple):
    node: int
    since: float
    second: bool


class Pool:
    """The extents of a model. Not thread-safe.

    Args:
        lengths: their bytes.
        fed: whether a node has all of them, and sends them to the others.
    """

    def __init__(self, lengths: Sequence[int], *, fed: bool = False) -> None:
        self._lengths, self._next = lengths, len(lengths) if fed else 0
        # the ends of files say little about how long a whole one takes
        self._typical = max(lengths, default=0) // 2
        self._reading: dict[int, _Reading] = {}
        self._read: dict[int, float] = dict.fromkeys(range(len(lengths)), 0.0) if fed else {}
        self._granted: set[tuple[int, int]] = set()
        self._times = self._seconds = self._began = 0.0

    def next(self, node: int, now: float, wanted: Sequence[int] = ()) -> int | None:
        """Return the extent that a node is to read now; None if there is none for it at the moment.

        Args:
            node: the node.
            now: monotonic seconds.
            wanted: extents that it would rather read by itself than wait for, once others have read them.
        """
        self._began = self._began or now
        if self._next < len(self._lengths):
            extent = self._next
            self._next += 1
            self._reading[extent] = _Reading(node, now, second=False)
            return extent
        slow = max(SLOW_SECONDS, SLOW_FACTOR * self._seconds / self._times) if self._times else float("inf")
        for extent, reading in self._reading.items():
            if reading.node != node and not reading.second and now - reading.since > slow:
                self._reading[extent] = reading._replace(second=True)
                return extent
        way = max(WAY_SECONDS, WAY_FACTOR * (now - self._began))
        for extent in wanted:
            # several readers of a node want the same ones at once
            if now - self._read.get(extent, now) > way and (node, extent) not in self._granted:
                self._granted.add((node, extent))
                return extent
        return None

    def done(self, extent: int, now: float) -> None:
        """Note that an extent has been read. Unknown ones are ignored."""
        reading = self._reading.pop(extent, None)
        if reading is None:
            return
        self._read[extent] = now
        if self._lengths[extent] > self._typical:
            self._seconds += now - reading.since
            self._times += 1
