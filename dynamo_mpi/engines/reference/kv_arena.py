# SPDX-License-Identifier: Apache-2.0
"""One block of memory for all KV that a prefill rank keeps: registered with NIXL once, and never unmapped under a peer that is late."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np

from dynamo_mpi.engines.reference.gguf_tensors import Float32Array


class ArenaFullError(Exception):
    """There is no gap as large as what was asked for."""


class Arena:
    """Arrays out of one block; each goes back when nothing refers to it, or to a view of it, any more. One thread takes them.

    Args:
        numbers: float32 that the block holds. The system gives the memory as it is written to.
    """

    def __init__(self, numbers: int) -> None:
        self.memory: Float32Array = np.empty(numbers, np.float32)
        self._gaps = [(0, numbers)] if numbers else []
        # a finalizer may run in any thread, in the middle of anything: it takes no lock
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, shape: tuple[int, ...]) -> Float32Array:
        """Return an array of ``shape``, in the first gap that holds it; what it contains is left over from before.

        Raises:
            ArenaFullError: no gap does.
        """
        self._take_back()
        size = math.prod(shape)
        for index, (start, stop) in enumerate(self._gaps):
            if stop - start >= size:
                self._gaps[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                return self._view(start, size).reshape(shape)
        raise ArenaFullError(
            f"{size} numbers are needed side by side, the largest of {len(self._gaps)} gaps has {self.largest_gap}"
        )

    @property
    def largest_gap(self) -> int:
        """Numbers that could be taken at once."""
        self._take_back()
        return max((stop - start for start, stop in self._gaps), default=0)

    def _view(self, start: int, size: int) -> Float32Array:
        # through a buffer, as views of an array's views refer to the array alone and not to each other
        values: Float32Array = np.frombuffer(memoryview(self.memory.data)[start : start + size], np.float32)
        weakref.finalize(values, self._returned.append, (start, start + size)).atexit = False
        return values

    def _take_back(self) -> None:
        gaps = self._gaps
        while self._returned:
            gaps.append(self._returned.popleft())
        self._gaps = []
        for start, stop in sorted(gaps):
            if self._gaps and self._gaps[-1][1] == start:
                start, _ = self._gaps.pop()
            self._gaps.append((start, stop))
