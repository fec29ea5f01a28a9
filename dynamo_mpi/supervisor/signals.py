# SPDX-License-Identifier: Apache-2.0
"""Handles a rank's signals in a thread: Python runs signal handlers in the main thread, which may block in a collective forever.

On rank 0 the first signal requests an orderly shutdown if one is possible, any other ends the world at once. SIGUSR2 (or SIGUSR1) asks for
a drain, as a batch job's ``--signal`` does before the time limit; it is ignored once a shutdown has begun.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from contextlib import contextmanager

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.process import DRAIN_SIGNALS, SHUTDOWN_SIGNALS
from dynamo_mpi.mpi.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType


SAME_SIGNAL_SECONDS = 1.0
"""Repetitions within this time are ignored: some launchers deliver a signal twice, through srun and to every rank."""
_STOP = b"\0"  # no signal's number


def signals_of(launcher: Launcher) -> Sequence[signal.Signals]:
    """Return the signals that request a rank's shutdown. Not SIGUSR1 under MPICH's mpiexec: with ``-disable-auto-cleanup`` it sends it to
    the remaining ranks when one has died."""
    ignored = signal.SIGUSR1 if launcher is Launcher.HYDRA else None
    return [number for number in SHUTDOWN_SIGNALS if number is not ignored]


class SignalThread:
    """Calls ``on_signal`` with the number of each of the signals, from a thread. Create and close it in the main thread.

    Args:
        on_signal: must be quick, or not return. With None, signals are kept until `begin`.
        signals: the handled signals; others of `SHUTDOWN_SIGNALS` are ignored.
    """

    def __init__(
        self, on_signal: Callable[[int], None] | None = None, signals: Sequence[signal.Signals] = SHUTDOWN_SIGNALS
    ) -> None:
        self._on_signal, self._signals = on_signal, signals
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SHUTDOWN_SIGNALS:
            # Python writes the number to the wakeup descriptor only if a Python handler is installed
            signal.signal(number, (lambda *_: None) if number in signals else signal.SIG_IGN)
            # signals must not interrupt the engine's native system calls
            signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        if on_signal is not None:
            self._thread.start()

    def begin(self, on_signal: Callable[[int], None]) -> None:
        """Call ``on_signal`` from now on, also with signals that have arrived before."""
        self._on_signal = on_signal
        self._thread.start()

    def close(self) -> None:
        """Ignore signals from now on: the rest of the shutdown is short and must not be interrupted."""
        for number in SHUTDOWN_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._before)
        # closing the pipe would not end the thread while a forked process holds a copy
        if self._thread.ident is not None:
            os.write(self._writer, _STOP)
            self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _run(self) -> None:
        while data := os.read(self._reader, 64):
            for number in data:
                if number == _STOP[0]:
                    return
                if number in self._signals and self._on_signal is not None:
                    # an error must not end the thread
                    with contextlib.suppress(Exception):
                        self._on_signal(number)


class ShutdownSignals:
    """Handles signals until `close`, whatever the main thread does. Create and close it in the main thread.

    Args:
        terminate_now: called from a thread with a signal that does not start an orderly shutdown.
        signals: the handled signals, from `signals_of`.
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
