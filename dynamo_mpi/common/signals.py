# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGHUP as flags instead of exceptions.

A handler that raises could interrupt the code between starting a child and recording it. So the handlers only set a flag; the code that
waits raises ``Interrupted`` where it can be handled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

from dynamo_mpi.common.errors import of_signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """The user or the parent process requests a shutdown."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = of_signal(number)


class Interrupts:
    """Records signals while the context is entered. For the main thread only.

    Args:
        signals: the signals that request a shutdown.
        wakes_on_exit: whether the exit of a child ends a sleep, too.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS, *, wakes_on_exit: bool = False) -> None:
        self._signals, self._wakes_on_exit = signals, wakes_on_exit
        self.first: int | None = None
        self.count = 0
        self._saved: dict[int, Any] = {}
        self._socket: socket.socket | None = None
        self._wake_read = self._wake_write = -1

    def __enter__(self) -> Interrupts:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in self._signals:
            if (
                signal.getsignal(number) != signal.SIG_IGN
            ):  # keep ignored signals ignored, as for nohup and background jobs
                self._saved[number] = signal.signal(number, self._note)
        if self._wakes_on_exit:
            self._saved[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._wake)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.first is None:
            self.first = number
        self._wake(number, frame)
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                self._socket.shutdown(socket.SHUT_RDWR)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the reader as well
            os.write(self._wake_write, b"!")

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has arrived."""
        if self.first is not None:
            raise Interrupted(self.first)

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or a signal arrives, or a child has exited, if that was asked for. Does not raise."""
        readable, _, _ = select.select([self._wake_read], [], [], max(0.0, seconds))
        if readable:
            os.read(self._wake_read, 4096)

    def pause(self, seconds: float) -> None:
        """Sleep; raise ``Interrupted`` as soon as a signal arrives."""
        self.check()
        self.sleep(seconds)
        self.check()

    @contextlib.contextmanager
    def closing(self, connected: socket.socket) -> Iterator[None]:
        """Shut the socket down when a signal arrives, so that a blocking read on it ends."""
        self._socket = connected
        try:
            self.check()
            yield
        finally:
            self._socket = None
