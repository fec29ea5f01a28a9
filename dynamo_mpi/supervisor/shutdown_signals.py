# SPDX-License-Identifier: Apache-2.0
"""Signals at rank 0: the first asks for an orderly end where there can be one, any other ends the world now.

SIGUSR1 is the warning that a batch job's time is nearly up (``--signal``): it hurries nobody whose end has begun.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS, SIGNALS, SignalThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType


class ShutdownSignals:
    """Takes them from its making to `close`, whatever the main thread is doing. Build and close it in the main thread.

    Args:
        hurry: called, from a thread, with a signal that leaves no time for an orderly end.
        signals: those that are taken, as `signal_thread.signals_of` has them.
        note: called with each signal, before anything is done about it. It must be quick.
    """

    def __init__(
        self,
        hurry: Callable[[int], object],
        signals: Sequence[signal.Signals] = SIGNALS,
        note: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._terminate_now, self._note = hurry, note
        self._begin: Callable[[int], object] | None = None
        self._in_loop = self._asked = False
        self._last = -math.inf
        # a handler may come in between at any line of the thread that it interrupts
        self._lock = threading.RLock()
        self._thread = SignalThread(self._from_thread, signals)
        for number in signals:
            signal.signal(number, self._handle)
            signal.siginterrupt(number, False)

    @contextmanager
    def in_event_loop(self) -> Iterator[None]:
        """Let the main thread run an event loop, from which there may be an orderly end: see `on_drain_request`."""
        # uvloop takes the descriptor that wakes our thread, and runs Python's handlers instead
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False
            self._begin = None

    def on_drain_request(self, begin: Callable[[int], object]) -> None:
        """Call ``begin`` with the next signal, as long as the event loop runs. It has to be quick, and is called from any thread."""
        self._begin = begin

    def close(self) -> None:
        """Ignore them from now on: what is left to do doesn't take long, and nobody shall take it from the other ranks."""
        self._thread.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._in_loop:
            self._arrived(number)

    def _from_thread(self, number: int) -> None:
        # in the loop too: one that came right before it is read here only now
        self._arrived(number)

    def _arrived(self, number: int) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last <= SAME_SIGNAL_SECONDS:
                return
            self._last = now
            begin, self._begin = self._begin, None
            if begin is None and self._asked and number == signal.SIGUSR1:
                return
            self._asked = True
        self._note(number)
        (begin or self._terminate_now)(number)
