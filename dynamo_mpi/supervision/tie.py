# SPDX-License-Identifier: Apache-2.0
"""A rank's tie to the companion of its node, from before ``MPI_Init`` on.

Until the verdict nobody else would notice that a rank has died, is stopped or has never come: MPI's own start waits for all of them, for
ever. The first rank of each node forks the companion (`companion`), which is no rank, and each rank of the node holds a connection to it.

Imported by every rank before the verdict, so by C modules alone: ``socket`` and ``threading`` bring a dozen more files from a shared
file system.
"""

from __future__ import annotations

import _socket
import _thread
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dynamo_mpi.exit_codes import of_signal
from dynamo_mpi.supervision.companion_address import address_of, peer_is_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.launchers.launch import Launch

_WAIT_SECONDS = 1.0
_AGAIN_SECONDS = 0.01
_LATER_SECONDS = 0.25
_READ_BYTES = 4096
_FRAMES = 12
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Tie:
    """Holds the connection, which a thread of its own answers. Nothing here raises; only the making of it waits, for a second at the most.

    Args:
        launch: how this rank was started.
        environ: names the world.
        connection: to the companion, on the rank that has brought it.
    """

    def __init__(self, launch: Launch, environ: Mapping[str, str], connection: _socket.socket | None) -> None:
        self._address = address_of(launch, environ)
        self._abort: Callable[[int], object] | None = None
        self._main = _thread.get_ident()
        # a signal's handler may tell something while the thread that it interrupts does
        self._lock = _thread.RLock()
        self._connection: _socket.socket | None = None
        self._unsent = f"rank {launch.rank}\n".encode()
        self._released = False
        self._ear: tuple[int, int] | None = None
        if connection is None and not self._address:
            return
        # MPI's start would wait for the first rank of this node as well; known to its companion, this rank may die there
        end = time.monotonic() + _WAIT_SECONDS
        while connection is None and (connection := self._try()) is None and time.monotonic() < end:
            time.sleep(_AGAIN_SECONDS)
        if connection is not None:
            self._take(connection)
        _start(self._run, connection)

    @property
    def holds(self) -> bool:
        """Whether there is a companion at the other end."""
        return self._connection is not None

    def hear_signals(self) -> None:
        """Have SIGTERM, SIGINT and SIGUSR1 end this rank, and say so before, whatever the main thread is doing. From the main thread."""
        self._ear = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _SIGNALS:
            # a handler of Python's has to be there for the number to be written
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if not _start(self._heed, reader):
            self.leave_signals()
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def leave_signals(self) -> None:
        """Leave the signals to others, whose handlers come next. From the main thread; idempotent."""
        if self._ear is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._ear[1])
            self._ear = None

    def end_with(self, abort: Callable[[int], object]) -> None:
        """Have ``abort`` end all ranks when the companion or a signal asks for it; until then this rank alone leaves, and the launcher ends
        the rest."""
        self._abort = abort

    def tell(self, line: str) -> None:
        """Tell the companion something, soon."""
        with self._lock:
            self._unsent += line.encode("utf-8", "replace") + b"\n"
            self._flush()

    def release(self) -> None:
        """Leave the companion: from here on it is no business of its what this rank does. Idempotent."""
        with self._lock:
            if self._released:
                return
            self._released = True
            self._unsent += b"leave\n"
            self._flush()
            if self._connection is not None:
                _shut(self._connection)

    def _flush(self) -> None:
        if self._connection is None:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except OSError:  # it takes nothing more, or has gone; what it has to know it learns from our end
            self._unsent = b""

    def _take(self, connection: _socket.socket) -> None:
        with self._lock:
            self._connection = connection
            self._flush()
            if self._released:
                _shut(connection)

    def _try(self) -> _socket.socket | None:
        """Return a connection to a companion of our own user, None while there is none."""
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.connect(self._address)
            if peer_is_ours(connection):
                return connection
        except OSError:
            pass
        connection.close()
        return None

    # what follows runs in threads

    def _run(self, connection: _socket.socket | None) -> None:
        while connection is None:
            # the first rank of this node isn't there yet
            time.sleep(_LATER_SECONDS)
            if self._released:
                return
            if (connection := self._try()) is not None:
                self._take(connection)
        heard = b""
        try:
            while data := connection.recv(_READ_BYTES):
                *lines, heard = (heard + data).split(b"\n")
                for line in lines:
                    self._obey(line.decode("utf-8", "replace").split())
        except OSError:
            pass
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def _obey(self, words: list[str]) -> None:
        if words == ["beat"]:
            self.tell("beat")
        elif words == ["stacks"]:
            from dynamo_mpi.supervision.frames import lines_of

            lines = lines_of(sys._current_frames().get(self._main))[:_FRAMES]
            self.tell("stacks " + "\v".join(lines))
        elif words[:1] == ["end"] and len(words) == 2 and words[1].isdecimal():
            self._end(int(words[1]))

    def _heed(self, reader: int) -> None:
        data = os.read(reader, 1)
        os.close(reader)
        if data:
            self.tell("told")
            self._end(of_signal(data[0]))

    def _end(self, code: int) -> None:
        if self._abort is not None:
            self._abort(code)
        os._exit(code)


def _start(run: Callable[..., object], argument: object) -> bool:
    try:
        _thread.start_new_thread(run, (argument,))
    except RuntimeError:  # no more threads for this user; then this rank is not watched
        return False
    return True


def _shut(connection: _socket.socket) -> None:
    """End it; the thread sees that, and closes it."""
    try:
        connection.shutdown(_socket.SHUT_RDWR)
    except OSError:
        return
