# SPDX-License-Identifier: Apache-2.0
"""Word of a failure for whoever is not of this world: each is told in a thread of its own, which nothing waits for longer than it has to."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.supervision.failure import Failure


class Word:
    """What is told of a failure, and to whom."""

    def __init__(self) -> None:
        self._tellers: list[Callable[[Failure, str, str], object]] = []
        self._telling: list[threading.Thread] = []

    def goes_to(self, tell: Callable[[Failure, str, str], object]) -> None:
        """Have ``tell`` called with the first cause, its host, and the report."""
        self._tellers.append(tell)

    def spread(self, first: Failure, host: str, report: str) -> None:
        """Tell all of them. Does not wait, and does not raise."""
        for tell in self._tellers:
            if (thread := begun(partial(tell, first, host, report))) is not None:
                self._telling.append(thread)

    def wait(self, late: float) -> None:
        """Wait until all have been told, or for this moment of the monotonic clock."""
        for thread in self._telling:
            thread.join(max(0.0, late - time.monotonic()))


def begun(act: Callable[[], object]) -> threading.Thread | None:
    """Begin to do it in a thread of its own, and return that; None where this user may have no more threads."""
    thread = threading.Thread(target=suppressed, args=(act,), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def suppressed(act: Callable[[], object]) -> None:
    """Do it; whatever it raises, the world has to end."""
    with contextlib.suppress(Exception):
        act()
