# SPDX-License-Identifier: Apache-2.0
"""Connects a rank to the agent of its node, from before ``MPI_Init`` until the rank exits.

The first rank of each node forks the agent (`node_agent`), a process that is not a rank. Each rank of the node keeps a connection to it. The
agent sees a rank die, whatever MPI does to the other ranks, and writes the report if no rank can. The rank that forked the agent notices
if the agent exits or is stopped, and starts another.

Every rank imports this module before the preflight result, so it uses C modules alone: ``socket`` and ``threading`` would load a dozen more
files from a shared file system.
"""

from __future__ import annotations

import _socket
import _thread
import contextlib
import os
import signal
import sys
import time

from dynamo_mpi.common.errors import of_signal
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.process import SHUTDOWN_SIGNALS, is_stopped
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_socket import Agent, agent_addresses, connect_to_agent, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo

_CONNECT_SECONDS = 1.0
_RETRY_SECONDS = 0.01
_FIRST_DELAY_SECONDS = 0.25
_MAX_DELAY_SECONDS = 5.0
_CHECK_SECONDS = 1
_READ_BYTES = 4096
_MOST_UNSENT_BYTES = 1 << 16
_FRAMES = 12
_PUBLISH_SECONDS = 2.0
_MARK_BYTES = 8
# the rank's state, in the order in which a new agent must receive it
_STATE_KEYS = ("rank", "segments", "phase", "agents", "preflight_done", "leases", "reported", "caches", "gpus")


class NodeAgentClient:
    """Keeps the connection; a thread of its own handles the agent's commands. No method raises; only the constructor waits, at most 1 s.

    Args:
        launch: how this rank was started.
        environ: environment variables that identify the world.
        agent: the agent that this rank started; None if another rank of the node starts it.
        replace: starts another agent after one has exited; returns None if that fails.
    """

    def __init__(
        self,
        launch: LaunchInfo,
        environ: Mapping[str, str],
        agent: Agent | None,
        replace: Callable[[], Agent | None] | None = None,
    ) -> None:
        self._addresses = agent_addresses(launch, environ)
        # MPICH's mpiexec may send it when another rank has died; this rank must go on
        self._ignored = (signal.SIGUSR1,) if launch.launcher is Launcher.HYDRA else ()
        self._abort: Callable[[int], object] | None = None
        self._main = _thread.get_ident()
        # reentrant: a signal handler may send while the thread that it interrupts is sending
        self._lock = _thread.RLock()
        self._connection: _socket.socket | None = None
        self._state: dict[str, str] = {"rank": str(launch.rank)}
        self._unsent = b""
        self._detached = False
        self._wakeup: tuple[int, int] | None = None
        self._agent, self._replace = agent, replace
        # lines that were sent before the first connection; a successor gets the state alone
        self._is_first_agent = True
        # descriptor of the socket on which rank 0's agent listens for the other agents; kept open for the agent's successor
        self._listener = -1
        # secret of all node agents of this world; set on rank 0 alone
        self.agent_token = ""
        self._published = _thread.allocate_lock()
        self._published.acquire()
        self._mark = os.urandom(_MARK_BYTES).hex()
        # as the agent reports it: the kernel names the process that called listen(), which is the first rank
        self._agent_pid = 0
        if agent is None and not self._addresses:
            return
        # identifies the processes that this rank starts: see `leftovers.MARK_VARIABLE`
        os.environ["DYN_MPI_RANK_MARK"] = self._mark
        connection = None if agent is None else agent.connection
        # MPI_Init would wait for the first rank of this node anyway; once connected, a death in MPI_Init is seen
        end = time.monotonic() + _CONNECT_SECONDS
        while connection is None and (connection := connect_to_agent(self._addresses)) is None:
            if time.monotonic() > end:
                break
            time.sleep(_RETRY_SECONDS)
        if connection is not None:
            self._use_connection(connection)
        _start(self._run, connection)

    @property
    def connected(self) -> bool:
        """Whether an agent is connected."""
        return self._connection is not None

    def await_connection(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for the next agent if the previous one has just exited; return whether one is connected."""
        end = time.monotonic() + seconds
        while not self.connected and time.monotonic() < end:
            time.sleep(_RETRY_SECONDS)
        return self.connected

    def resume_agent(self) -> None:
        """Send SIGCONT to the agent if it is stopped."""
        if self._agent_pid and is_stopped(self._agent_pid):
            _signal(self._agent_pid, signal.SIGCONT)

    def install_signal_handlers(self) -> None:
        """Make the signals of a shutdown notify the agent and end this rank, whatever the main thread does. Call from the main thread."""
        self._wakeup = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SHUTDOWN_SIGNALS:
            # Python writes the number to the wakeup descriptor only if a Python handler is installed
            signal.signal(number, signal.SIG_IGN if number in self._ignored else _on_signal)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if not _start(self._wait_for_signal, reader):
            self.uninstall_signal_handlers()
            for number in SHUTDOWN_SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def uninstall_signal_handlers(self) -> None:
        """Stop handling signals, so that other handlers can be installed. Call from the main thread; idempotent."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])
            self._wakeup = None

    def set_abort(self, abort: Callable[[int], object]) -> None:
        """Call ``abort`` to end all ranks when the agent or a signal requires it. Without it this rank alone exits, and the launcher
        ends the others."""
        self._abort = abort

    def send(self, line: str) -> None:
        """Send the agent a line without waiting. Lines that describe this rank's state are also sent to the agent's successors."""
        key, _, value = line.partition(" ")
        if key == "health":
            word, _, value = value.partition(" ")
            key = f"health {word}"
        with self._lock:
            if key in _STATE_KEYS or key.startswith("health "):
                self._state[key] = value
            # health lines are part of the state, and come again and again
            most = _MOST_UNSENT_BYTES if key.startswith("health ") else 8 * _MOST_UNSENT_BYTES
            if (self._connection is None and key.startswith("health ")) or len(self._unsent) > most:
                return
            self._unsent += line.encode("utf-8", "replace") + b"\n"
            self._flush()

    def note_signal(self, number: int) -> None:
        """Report that this rank got a signal: if it exits soon, that is not a failure."""
        self.send(f"signalled {number}")

    def publish(self, line: str) -> bool:
        """Let the agent write a report; wait at most 2 s and return whether it did. From any thread but this client's own."""
        if not self.connected:
            return False
        # reset: an earlier reply may have come too late
        self._published.acquire(False)
        self.send(line)
        return self._published.acquire(True, _PUBLISH_SECONDS)

    def give_listener(self, descriptor: int) -> None:
        """Pass the agent the socket on which it accepts the agents of other nodes; it replaces an earlier one. A copy stays open here for
        the agent's successors."""
        with self._lock:
            if self._listener >= 0:
                os.close(self._listener)
            self._listener = os.dup(descriptor)
            if self._connection is not None:
                self._send_listener(self._connection)

    def detach(self) -> None:
        """Detach from the agent: from now on it ignores what this rank does. Idempotent."""
        with self._lock:
            if self._detached:
                return
            self._detached = True
            self._unsent += b"detach\n"
            self._flush()
            if self._connection is not None:
                _shut(self._connection)
        if self._agent is not None and is_stopped(self._agent.pid):
            # it would never exit, and the launcher waits until its descriptors are closed
            _signal(self._agent.pid, signal.SIGKILL)

    def _flush(self) -> None:
        if self._connection is None:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent, _socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return  # the agent doesn't read now: the rest follows with the next line, and with its next ping
        except OSError:  # it has exited; it still sees our connection close
            self._unsent = b""

    def _use_connection(self, connection: _socket.socket) -> None:
        inode = os.fstat(connection.fileno()).st_ino
        with self._lock:
            if self._agent is not None:
                # struct timeval: recv returns every second so that this thread can check whether the agent is stopped
                limit = _CHECK_SECONDS.to_bytes(8, sys.byteorder) + bytes(8)
                connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, limit)
            self._connection = connection
            if self._listener >= 0:
                self._send_listener(connection)
            health = [key for key in self._state if key.startswith("health ")]
            lines = [f"{key} {self._state[key]}" for key in (*_STATE_KEYS, *health) if key in self._state]
            lines.insert(0, f"mark {self._mark} {inode}")
            early = self._unsent if self._is_first_agent else b""
            self._is_first_agent = False
            self._unsent = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace") + early
            self._flush()
            if self._detached:
                _shut(connection)

    def _send_listener(self, connection: _socket.socket) -> None:
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, self._listener.to_bytes(4, sys.byteorder))]
        with contextlib.suppress(OSError):
            connection.sendmsg([b"listener\n"], ancillary)

    # the following methods run in threads

    def _run(self, connection: _socket.socket | None) -> None:
        # the first rank of this node may not have started the agent yet
        delay = _FIRST_DELAY_SECONDS
        while connection is not None or (connection := self._reconnect(delay)) is not None:
            self._receive_commands(connection)
            with self._lock:
                self._connection = None
                self._unsent = b""
            connection.close()
            if self._detached:
                return
            connection, delay = None, _RETRY_SECONDS
            if self._agent is not None and (connection := self._replace_agent()) is None:
                return

    def _reconnect(self, delay: float) -> _socket.socket | None:
        """Connect to the agent or its successor, with growing delays between attempts; None if this rank has detached."""
        while self._addresses and not self._detached:
            time.sleep(delay)
            if (connection := connect_to_agent(self._addresses)) is not None:
                self._use_connection(connection)
                return connection
            delay = min(1.1 * delay, _MAX_DELAY_SECONDS)
        return None

    def _receive_commands(self, connection: _socket.socket) -> None:
        """Handle the agent's commands until the connection closes."""
        received = b""
        stopped = False
        while True:
            try:
                data = connection.recv(_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                # only if stopped twice in a row: a debugger or the system may stop it for a moment
                was_stopped, stopped = stopped, self._agent is not None and is_stopped(self._agent.pid)
                if was_stopped and stopped and self._agent is not None:
                    _signal(self._agent.pid, signal.SIGKILL)
                continue
            except OSError:
                return
            if not data:
                return
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                self._handle_command(line.decode("utf-8", "replace").split())

    def _replace_agent(self) -> _socket.socket | None:
        """Start a successor of an agent that has exited and return the connection to it; None if that fails."""
        if self._agent is not None:
            _reap(self._agent.pid)
        self._agent = None if self._replace is None else self._replace()
        if self._agent is None:
            warn("the node agent has ended and could not be restarted: from now on rank 0 alone reports why ranks end")
            return None
        agent = self._agent
        self._use_connection(agent.connection)
        warn(f"the node agent has ended (killed or stopped by a signal); started another one, process {agent.pid}")
        return agent.connection

    def _handle_command(self, command: list[str]) -> None:
        if command == ["ping"]:
            self.send("ping")
        elif command[:1] == ["agent"] and len(command) == 2 and command[1].isdecimal():
            self._agent_pid = int(command[1])
        elif command == ["published"]:
            if self._published.locked():
                self._published.release()
        elif command == ["stacks"]:
            from dynamo_mpi.common.process import format_frames

            lines = format_frames(sys._current_frames().get(self._main))[:_FRAMES]
            self.send("stacks " + "\v".join(lines))
        elif command[:1] == ["end"] and len(command) == 2 and command[1].isdecimal():
            self._end(int(command[1]))

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


def _on_signal(*_: object) -> None:
    """Do nothing: Python writes the signal's number to the wakeup descriptor."""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _reap(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.waitpid(pid, 0)


def _start(run: Callable[..., object], argument: object) -> bool:
    try:
        _thread.start_new_thread(run, (argument,))
    except RuntimeError:  # thread limit of this user reached: this rank is not watched
        return False
    return True


def _shut(connection: _socket.socket) -> None:
    """Shut the connection down; the thread notices and closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(_socket.SHUT_RDWR)
