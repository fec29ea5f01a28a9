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

from dynamo_mpi.supervision.companion_address import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.launchers.launch import Launch

_CONNECT_SECONDS = 30.0
_WAIT_SECONDS = 1.0
_AGAIN_SECONDS = 0.01
_READ_BYTES = 4096
_RESCUE_SECONDS = 3.0
_CREDENTIALS_BYTES = 12


class Tie:
    """Holds the connection, which a thread of its own answers. Nothing here raises; only the making of it waits, for a second at the most.

    Args:
        launch: how this rank was started.
        environ: names the world.
    """

    def __init__(self, launch: Launch, environ: Mapping[str, str]) -> None:
        self._rank = launch.rank
        self._address = address_of(launch, environ)
        self._abort: Callable[[int], object] | None = None
        # a signal's handler may tell something while the thread that it interrupts does
        self._lock = _thread.RLock()
        self._connection: _socket.socket | None = None
        self._unsent = f"rank {launch.rank} {os.getpid()}\n".encode()
        self._released = False
        if self._address:
            # MPI's start would wait for the first rank of this node as well; known to its companion, this rank may die there
            end = time.monotonic() + _WAIT_SECONDS
            while (connection := self._try()) is None and time.monotonic() < end:
                time.sleep(_AGAIN_SECONDS)
            _thread.start_new_thread(self._run, (connection,))

    @property
    def holds(self) -> bool:
        """Whether there is a companion at the other end."""
        return self._connection is not None

    def end_with(self, abort: Callable[[int], object]) -> None:
        """Have ``abort`` end all ranks when the companion asks for it; until then this rank alone leaves, and the launcher ends the rest."""
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
                self._shut(self._connection)

    def _flush(self) -> None:
        if self._connection is None:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except OSError:  # it takes nothing more, or has gone; what it has to know it learns from our end
            self._unsent = b""

    @staticmethod
    def _shut(connection: _socket.socket) -> None:
        """End it; the thread sees that, and closes it."""
        try:
            connection.shutdown(_socket.SHUT_RDWR)
        except OSError:
            return

    def _take(self, connection: _socket.socket) -> None:
        with self._lock:
            self._connection = connection
            self._flush()
            if self._released:
                self._shut(connection)

    def _run(self, connection: _socket.socket | None) -> None:
        end = time.monotonic() + _CONNECT_SECONDS
        while connection is None:
            # the first rank of this node isn't there yet
            time.sleep(_AGAIN_SECONDS)
            if self._released or time.monotonic() > end:
                return
            connection = self._try()
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

    def _try(self) -> _socket.socket | None:
        """Return a connection to a companion of our own user, None while there is none."""
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.connect(self._address)
            credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
        except OSError:
            connection.close()
            return None
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
            connection.close()
            return None
        self._take(connection)
        return connection

    def _obey(self, words: list[str]) -> None:
        if words == ["beat"]:
            self.tell("beat")
        elif words == ["stacks"]:
            from dynamo_mpi.supervision.stacks import own_stacks

            text = own_stacks().replace("\n", "\v")
            self.tell(f"stacks {text}")
        elif words[:1] == ["end"] and len(words) == 2 and words[1].isdecimal():
            self._end(int(words[1]))

    def _end(self, code: int) -> None:
        abort = self._abort
        if abort is not None:
            # an MPI that can't end its ranks is no reason to stay
            _thread.start_new_thread(_leave_later, (code,))
            abort(code)
        os._exit(code)


def _leave_later(code: int) -> None:
    time.sleep(_RESCUE_SECONDS)
    os._exit(code)


def bring_companion(launch: Launch, host: str, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Fork the companion of this node, if that is for this rank to do. Only before MPI and any thread is started. Does not raise.

    Args:
        launch: how this rank was started.
        host: this node.
        argv: the worker's command line, without the program.
        environ: names the world, and holds the companion's limits.
    """
    address = address_of(launch, environ)
    if not address or launch.local_rank not in (0, None) or (launch.local_rank is None and launch.rank):
        return
    try:
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        listener.bind(address)
        # all ranks of a node come at the same moment
        listener.listen(max(128, launch.local_size or 0))
        pid = os.fork()
    except OSError:  # another world of the same name, or no room for a process: then nobody watches before the verdict
        return
    if pid:
        listener.close()
        return
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # in this process, not in a new interpreter: it has to be there before the first rank dies
        from dynamo_mpi.supervision.companion import accompany

        accompany(listener.detach(), launch, host, argv, environ)
        code = 0
    finally:
        os._exit(code)
