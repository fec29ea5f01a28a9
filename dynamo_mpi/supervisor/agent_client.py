# SPDX-License-Identifier: Apache-2.0
"""A rank's connection to the agent of its node, from before ``MPI_Init`` to its end.

The first rank of each node forks the agent (`node_agent`), which is no rank, and each rank of the node holds a connection to it: the agent
sees the rank die, whatever MPI does to the others, and writes the report if no rank is left to do so. The rank that has forked the agent sees
it end or stop, and starts another.

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
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.exit_codes import of_signal
from dynamo_mpi.common.process import is_stopped
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_socket import agent_socket_name, peer_is_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo

_WAIT_SECONDS = 1.0
_AGAIN_SECONDS = 0.01
_LATER_SECONDS = 0.25
_LATEST_SECONDS = 5.0
_LOOK_SECONDS = 1
_READ_BYTES = 4096
_FRAMES = 12
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PUBLISH_SECONDS = 2.0
_MOST_AGENTS = 5
_MARK_BYTES = 8
# what a rank has said of itself, in the order in which a new agent has to hear it
_STANDING = ("rank", "phase", "agents", "preflight_done", "leases", "reported")


class Agent(NamedTuple):
    """A node agent that this rank has started.

    Args:
        connection: to it.
        pid: its process, a child of this one.
    """

    connection: _socket.socket
    pid: int


class NodeAgentClient:
    """Holds the connection, which a thread of its own answers. Nothing here raises; only the making of it waits, for a second at the most.

    Args:
        launch: how this rank was started.
        environ: names the world.
        agent: the one that this rank has started; None where another rank of its node does.
        replace: starts another agent after one that has ended; returns None where it can't.
    """

    def __init__(
        self,
        launch: LaunchInfo,
        environ: Mapping[str, str],
        agent: Agent | None,
        replace: Callable[[], Agent | None] | None = None,
    ) -> None:
        self._address = agent_socket_name(launch, environ)
        # MPICH's mpiexec may send it where a rank has died: no reason to end
        self._ignored = (signal.SIGUSR1,) if launch.launcher is Launcher.HYDRA else ()
        self._abort: Callable[[int], object] | None = None
        self._main = _thread.get_ident()
        # a signal's handler may send something while the thread that it interrupts does
        self._lock = _thread.RLock()
        self._connection: _socket.socket | None = None
        self._standing: dict[str, str] = {"rank": str(launch.rank)}
        self._unsent = b""
        self._detached = False
        self._wakeup: tuple[int, int] | None = None
        self._agent, self._replace, self._agents = agent, replace, 1
        # of the socket at which rank 0's agent hears those of other nodes; kept open for the agent's successor
        self._listener = -1
        # what all node agents of this world know, on rank 0
        self.agent_token = ""
        self._published = _thread.allocate_lock()
        self._published.acquire()
        self._mark = os.urandom(_MARK_BYTES).hex()
        # its process as it has said itself: the kernel names the one that has begun to listen, which is the first rank
        self._agent_pid = 0
        if agent is None and not self._address:
            return
        # what this rank starts is known by it: see `descendants.MARK_VARIABLE`
        os.environ["DYN_MPI_RANK_MARK"] = self._mark
        connection = None if agent is None else agent.connection
        # MPI's start would wait for the first rank of this node as well; known to its agent, this rank may die there
        end = time.monotonic() + _WAIT_SECONDS
        while connection is None and (connection := self._try()) is None and time.monotonic() < end:
            time.sleep(_AGAIN_SECONDS)
        if connection is not None:
            self._take(connection)
        _start(self._run, connection)

    @property
    def connected(self) -> bool:
        """Whether there is an agent at the other end."""
        return self._connection is not None

    def await_connection(self, seconds: float) -> bool:
        """Wait for the next agent where the one before has just ended, and return whether there is one."""
        end = time.monotonic() + seconds
        while not self.connected and time.monotonic() < end:
            time.sleep(_AGAIN_SECONDS)
        return self.connected

    def resume_agent(self) -> None:
        """Have an agent go on that was stopped: it is needed now."""
        if self._agent_pid and is_stopped(self._agent_pid):
            _signal(self._agent_pid, signal.SIGCONT)

    def install_signal_handlers(self) -> None:
        """Have SIGTERM, SIGINT and SIGUSR1 end this rank, and say so before, whatever the main thread is doing. From the main thread."""
        self._wakeup = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _SIGNALS:
            # a handler of Python's has to be there for the number to be written
            signal.signal(number, signal.SIG_IGN if number in self._ignored else _wake)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if not _start(self._wait_for_signal, reader):
            self.uninstall_signal_handlers()
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def uninstall_signal_handlers(self) -> None:
        """Leave the signals to others, whose handlers come next. From the main thread; idempotent."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])
            self._wakeup = None

    def set_abort(self, abort: Callable[[int], object]) -> None:
        """Have ``abort`` end all ranks when the agent or a signal asks for it; until then this rank alone leaves, and the launcher ends
        the rest."""
        self._abort = abort

    def send(self, line: str) -> None:
        """Send the agent a line, soon. What says how this rank stands is sent to a successor of the agent as well."""
        word, _, rest = line.partition(" ")
        with self._lock:
            if word in _STANDING:
                self._standing[word] = rest
            self._unsent += line.encode("utf-8", "replace") + b"\n"
            self._flush()

    def publish(self, line: str) -> bool:
        """Have the agent write a report, and return whether it has: two seconds at the most. From any thread but the agent's."""
        if not self.connected:
            return False
        # of one that came too late
        self._published.acquire(False)
        self.send(line)
        return self._published.acquire(True, _PUBLISH_SECONDS)

    def give_listener(self, descriptor: int) -> None:
        """Hand the socket over at which the agents of other nodes are heard, in place of one that was given before; it stays open here for a
        successor of the agent."""
        with self._lock:
            if self._listener >= 0:
                os.close(self._listener)
            self._listener = os.dup(descriptor)
            if self._connection is not None:
                self._send_listener(self._connection)

    def detach(self) -> None:
        """Leave the agent: from here on it is no business of its what this rank does. Idempotent."""
        with self._lock:
            if self._detached:
                return
            self._detached = True
            self._unsent += b"detach\n"
            self._flush()
            if self._connection is not None:
                _shut(self._connection)
        if self._agent is not None and is_stopped(self._agent.pid):
            # it would stay for ever, and with it a launcher that waits for what it holds open
            _signal(self._agent.pid, signal.SIGKILL)

    def _flush(self) -> None:
        if self._connection is None:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except OSError:  # it takes nothing more, or has gone; what it has to know it learns from our end
            self._unsent = b""

    def _take(self, connection: _socket.socket) -> None:
        inode = os.fstat(connection.fileno()).st_ino
        with self._lock:
            if self._agent is not None:
                # to look at it now and then; a second, and no microseconds
                limit = _LOOK_SECONDS.to_bytes(8, sys.byteorder) + bytes(8)
                connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, limit)
            self._connection = connection
            if self._listener >= 0:
                self._send_listener(connection)
            lines = [f"{word} {self._standing[word]}" for word in _STANDING if word in self._standing]
            lines.insert(0, f"mark {self._mark} {inode}")
            early = self._unsent if self._agents == 1 else b""
            self._unsent = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace") + early
            self._flush()
            if self._detached:
                _shut(connection)

    def _send_listener(self, connection: _socket.socket) -> None:
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, self._listener.to_bytes(4, sys.byteorder))]
        try:
            connection.sendmsg([b"listener\n"], ancillary)
        except OSError:
            return

    def _try(self) -> _socket.socket | None:
        """Return a connection to an agent of our own user, None while there is none."""
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
        # at first the first rank of this node isn't there yet
        pause = _LATER_SECONDS
        while connection is not None or (connection := self._reconnect(pause)) is not None:
            self._listen(connection)
            with self._lock:
                self._connection = None
                self._unsent = b""
            connection.close()
            if self._detached:
                return
            connection, pause = None, _AGAIN_SECONDS
            if self._agent is not None and (connection := self._start_another()) is None:
                return

    def _reconnect(self, pause: float) -> _socket.socket | None:
        """Wait until the agent, or the next one, is there, asking at growing intervals; None where this rank needs it no longer."""
        while self._address and not self._detached:
            time.sleep(pause)
            if (connection := self._try()) is not None:
                self._take(connection)
                return connection
            pause = min(1.1 * pause, _LATEST_SECONDS)
        return None

    def _listen(self, connection: _socket.socket) -> None:
        """Do what the agent says, until it ends."""
        heard = b""
        stopped = False
        while True:
            try:
                data = connection.recv(_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                # twice in a row: a debugger, or the system, may stop it for a moment
                before, stopped = stopped, self._agent is not None and is_stopped(self._agent.pid)
                if before and stopped and self._agent is not None:
                    _signal(self._agent.pid, signal.SIGKILL)
                continue
            except OSError:
                return
            if not data:
                return
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                self._handle_command(line.decode("utf-8", "replace").split())

    def _start_another(self) -> _socket.socket | None:
        """Start an agent in place of the one that has ended, and return the connection to it; None where there is none."""
        from dynamo_mpi.supervisor.agent_start import warn

        if self._agent is not None:
            _reap(self._agent.pid)
        self._agents += 1
        self._agent = self._replace() if self._replace is not None and self._agents <= _MOST_AGENTS else None
        if self._agent is None:
            warn(
                "the node agent has ended, and no other could be started: from here on rank 0 alone reports why ranks end"
            )
            return None
        agent = self._agent
        self._take(agent.connection)
        warn(f"the node agent has ended (killed, or stopped by a signal): another is started, process {agent.pid}")
        return agent.connection

    def _handle_command(self, words: list[str]) -> None:
        if words == ["ping"]:
            self.send("ping")
        elif words[:1] == ["agent"] and len(words) == 2 and words[1].isdecimal():
            self._agent_pid = int(words[1])
        elif words == ["published"]:
            if self._published.locked():
                self._published.release()
        elif words == ["stacks"]:
            from dynamo_mpi.common.frames import format_frames

            lines = format_frames(sys._current_frames().get(self._main))[:_FRAMES]
            self.send("stacks " + "\v".join(lines))
        elif words[:1] == ["end"] and len(words) == 2 and words[1].isdecimal():
            self._end(int(words[1]))

    def _wait_for_signal(self, reader: int) -> None:
        data = os.read(reader, 1)
        os.close(reader)
        if data:
            self.send("reported")
            self._end(of_signal(data[0]))

    def _end(self, code: int) -> None:
        if self._abort is not None:
            self._abort(code)
        os._exit(code)


def _wake(*_: object) -> None:
    """Have the number of a signal be written."""


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except OSError:
        return


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
