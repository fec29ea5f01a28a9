# SPDX-License-Identifier: Apache-2.0
"""Signals in a thread: Python runs its own handlers in the main thread, which may sit in a collective that doesn't end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.mpi.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 1.0
"""Launchers that forward a signal to srun and to every rank deliver it twice."""
_STOP = b"\0"  # no signal's number


def signals_of(launcher: Launcher) -> Sequence[signal.Signals]:
    """Return those that ask a rank for an end. MPICH's mpiexec sends SIGUSR1 to the ranks that are left when one has died (with
    ``-disable-auto-cleanup``): that is no word of the job's time, and the death is seen without it."""
    return SIGNALS[:2] if launcher is Launcher.HYDRA else SIGNALS


class SignalThread:
    """Calls ``on_signal`` with the number of each SIGTERM, SIGINT and SIGUSR1, from a thread. Build and close it in the main thread.

    Args:
        on_signal: has to be quick, or not to return. None keeps the signals until `begin` says what to call.
        signals: those that are taken; what else is in `SIGNALS` is ignored.
    """

    def __init__(
        self, on_signal: Callable[[int], None] | None = None, signals: Sequence[signal.Signals] = SIGNALS
    ) -> None:
        self._on_signal, self._signals = on_signal, signals
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            # a handler of Python's has to be there for the number to be written
            signal.signal(number, (lambda *_: None) if number in signals else signal.SIG_IGN)
            # what the engine waits for in native code is no business of a signal's
            signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        if on_signal is not None:
            self._thread.start()

    def begin(self, on_signal: Callable[[int], None]) -> None:
        """Call ``on_signal`` from now on, also with signals that have come before."""
        self._on_signal = on_signal
        self._thread.start()

    def close(self) -> None:
        """Ignore them from now on: what is left to do doesn't take long, and nobody shall take it from the other ranks."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._before)
        # its end would not be seen while a process that was forked here holds it too
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
                    # one that fails is no reason to be deaf to the next
                    with contextlib.suppress(Exception):
                        self._on_signal(number)
