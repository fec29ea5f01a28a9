# SPDX-License-Identifier: Apache-2.0
"""Signals in a thread: Python runs its own handlers in the main thread, which may sit in a collective that doesn't end."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP = b"\0"  # no signal's number


class SignalThread:
    """Calls ``on_signal`` with the number of each SIGTERM, SIGINT and SIGUSR1, from a thread. Build and close it in the main thread.

    Args:
        on_signal: has to be quick, or not to return.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            # a handler of Python's has to be there for the number to be written
            signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ignore them from now on: what is left to do doesn't take long, and nobody shall take it from the other ranks."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._before)
        # its end would not be seen while a process that was forked here holds it too
        os.write(self._writer, _STOP)
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _run(self) -> None:
        while data := os.read(self._reader, 64):
            for number in data:
                if number == _STOP[0]:
                    return
                if number in _SIGNALS:
                    self._on_signal(number)
