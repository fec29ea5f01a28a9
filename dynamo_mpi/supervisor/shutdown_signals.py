# SPDX-License-Identifier: Apache-2.0
"""Signals of rank 0: the first requests an orderly shutdown if one is possible, any other ends the world at once.

SIGUSR2 (or SIGUSR1) asks for a drain, as a batch job's ``--signal`` does before the time limit; it is ignored once a shutdown has begun.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dynamo_mpi.common.process import DRAIN_SIGNALS, SHUTDOWN_SIGNALS
from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS, SignalThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType


class ShutdownSignals:
    """Handles signals until `close`, whatever the main thread does. Create and close it in the main thread.

    Args:
        terminate_now: called from a thread with a signal that does not start an orderly shutdown.
        signals: the handled signals, from `signal_thread.signals_of`.
        on_signal: called with each signal before it is handled. It must be quick.
    """

    def __init__(
        self,
        terminate_now: Callable[[int], object],
        signals: Sequence[signal.Signals] = SHUTDOWN_SIGNALS,
        on_signal: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._terminate_now, self._on_signal = terminate_now, on_signal
        self._start_drain: Callable[[int], object] | None = None
        self._in_loop = self._requested = False
        self._last_signal_at = -math.inf
        # reentrant: a handler may interrupt its own thread at any line
        self._lock = threading.RLock()
        self._thread = SignalThread(self._on_thread_signal, signals)
        for number in signals:
            signal.signal(number, self._handle)
            signal.siginterrupt(number, False)

    @contextmanager
    def in_event_loop(self) -> Iterator[None]:
        """Declare that the main thread runs an event loop, which can shut down in order: see `on_drain_request`."""
        # uvloop replaces the wakeup descriptor of our thread and runs Python's handlers instead
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False
            self._start_drain = None

    def on_drain_request(self, start_drain: Callable[[int], object]) -> None:
        """Call ``start_drain`` with the next signal while the event loop runs. It must be quick; called from any thread."""
        self._start_drain = start_drain

    def close(self) -> None:
        """Ignore signals from now on: the rest of the shutdown is short and must not be interrupted."""
        self._thread.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._in_loop:
            self._on_arrival(number)

    def _on_thread_signal(self, number: int) -> None:
        # even during the event loop: a signal from just before it is read only now
        self._on_arrival(number)

    def _on_arrival(self, number: int) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last_signal_at <= SAME_SIGNAL_SECONDS:
                return
            self._last_signal_at = now
            start_drain, self._start_drain = self._start_drain, None
            if start_drain is None and self._requested and number in DRAIN_SIGNALS:
                return
            self._requested = True
        self._on_signal(number)
        (start_drain or self._terminate_now)(number)
