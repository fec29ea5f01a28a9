# SPDX-License-Identifier: Apache-2.0
"""Starts a node's agent: forked before MPI_Init, its successors as new processes. Only a node's first rank imports it.

The agent answers the health requests of its node too, so that a node has one process beside its ranks.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import json
import os
import signal
import sys
import time

from dynamo_mpi.common.credentials import held, hold
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.config.sources import EarlySettings
from dynamo_mpi.supervisor.agent_socket import Agent, agent_addresses, listen_for_ranks, remove_address, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.telemetry.health_address import HealthEndpoint

# signals that a launcher or an operator sends to all processes of a step: the agent must outlive its ranks
_IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MAX_AGENTS = 5
_MIN_BACKLOG = 128
_NAME_SECONDS = 1.0
_RETRY_SECONDS = 0.01


class AgentStarter:
    """Starts the agent of this node, and its successors.

    Args:
        launch: how this rank was started; it is its node's first.
        host: this node.
        settings: the agent's settings.
        environ: environment variables; they identify the world.
        health: where the agent answers health requests; None for nowhere. Its socket stays open here for the agent's successors.
    """

    def __init__(
        self,
        launch: LaunchInfo,
        host: str,
        settings: EarlySettings,
        environ: Mapping[str, str],
        health: HealthEndpoint | None = None,
    ) -> None:
        self._launch, self._host, self._settings = launch, host, settings
        self._environ, self._health = environ, health
        self._addresses = agent_addresses(launch, environ)
        self._started = (os.getpid(), time.time(), time.monotonic())
        self._count = 0

    def spawn(self) -> Agent | None:
        """Fork the agent. Call it before MPI and any thread is started. Does not raise.

        Returns:
            The agent; None if it can't be started.
        """
        self._count += 1
        if not self._addresses and self._launch.size != 1 and self._health is None:
            return None
        # a signal that arrives meanwhile is delivered only to this rank
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            listener = self._listen_or_warn()
            rank_end, agent_end = _socket.socketpair()
            pid = os.fork()
            if pid:
                for each in (listener, agent_end):
                    if each is not None:
                        each.close()
                return Agent(rank_end, pid)
        except OSError as error:
            self._close_health()
            warn(
                "no node agent watches the ranks of this node"
                f"{'' if self._health is None else ', and /health, /live and /metrics are not served here'}: {error.strerror}; "
                "rank 0 alone watches them, from the preflight result on. Raise this user's limits of processes (ulimit -u), open files "
                "(ulimit -n) or memory, and start the worker again",
                self._host,
            )
            return None
        finally:
            if os.getpid() == self._started[0]:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            _ignore_signals()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            rank_end.close()
            os.setsid()
            # in this process: a new interpreter would start too late to see an early death
            listening = None if listener is None else listener.detach()
            _run(listening, agent_end.detach(), self._launch, self._host, self._settings, self._health, self._started)
            remove_address(self._addresses)
        except BaseException as error:  # after any error, this process must not go on as a rank
            warn(f"the node agent of {self._host} has failed: {type(error).__name__}: {error}", self._host)
        finally:
            os._exit(0)

    def respawn(self) -> Agent | None:
        """Start a successor of an agent that has exited: as a new process, because MPI and threads run in this one.

        Returns:
            The agent; None if it can't be started, or if too many have ended.
        """
        self._count += 1
        agent = self._start_process() if self._count <= _MAX_AGENTS else None
        if agent is None:
            if self._health is not None:
                warn(
                    "/health, /live and /metrics are not served on this node any longer: the node agent has ended",
                    self._host,
                )
            self._close_health()
        return agent

    def _start_process(self) -> Agent | None:
        import subprocess
        from pathlib import Path

        from dynamo_mpi.supervisor.leftovers import MARK_VARIABLE

        listener: _socket.socket | None = None
        start: dict[str, Any] = {
            "launch": [self._launch.launcher.name, *self._launch[1:5]],
            "host": self._host,
            "settings": list(self._settings),
            "started": list(self._started),
            "secrets": held(),
        }
        try:
            rank_end, agent_end = _socket.socketpair()
            numbers = [agent_end.fileno()]
            if self._addresses:
                listener = _listen(self._addresses, self._launch, wait_for_name=True)
                start["addresses"] = self._addresses
                start["listener"] = listener.fileno()
                numbers.append(listener.fileno())
            if self._health is not None:
                start["health"] = [list(self._health.address), self._health.listener.fileno()]
                numbers.append(self._health.listener.fileno())
            package = str(Path(__file__).parents[2])
            path = os.pathsep.join(filter(None, (package, self._environ.get("PYTHONPATH"))))
            # without the mark: the agent must not be ended with this rank's descendants
            variables = {name: value for name, value in self._environ.items() if name != MARK_VARIABLE}
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(agent_end.fileno())],
                env={**variables, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=numbers,
                start_new_session=True,
            )
        except OSError:
            return None
        finally:
            if listener is not None:
                listener.close()
        agent_end.close()
        with contextlib.suppress(OSError):
            rank_end.sendall(json.dumps(start).encode() + b"\n")
        # otherwise `Popen` warns, when the object is deleted, that its process still runs
        process.returncode = 0
        return Agent(rank_end, process.pid)

    def _listen_or_warn(self) -> _socket.socket | None:
        """Listen for the other ranks of this node; if that fails, only this rank is watched."""
        try:
            return _listen(self._addresses, self._launch) if self._addresses else None
        except OSError as error:
            why = error.strerror
            if error.errno == errno.EADDRINUSE:
                why = (
                    "other processes hold all of its addresses; ss -xlp | grep dynamo_mpi (as root) shows which; have them ended, and start "
                    "the worker again"
                )
            warn(
                f"the node agent watches rank {self._launch.rank} alone: the other ranks of this node are watched by rank 0 only, from the "
                f"preflight result on. The agent can't listen for them: {why}",
                self._host,
            )
            return None

    def _close_health(self) -> None:
        if self._health is not None:
            self._health.listener.close()


def main(first: str) -> None:
    """Run as an agent that `AgentStarter.respawn` started."""
    import socket

    from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
    from dynamo_mpi.telemetry.health_address import HealthAddress, HealthEndpoint

    _ignore_signals()
    connection = _socket.socket(fileno=int(first))
    line = b""
    # read byte by byte: what follows the line is for the agent
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    start = json.loads(line)
    hold(start["secrets"])
    name, *rest = start["launch"]
    launch, settings = LaunchInfo(Launcher[name], *rest), EarlySettings(*start["settings"])
    health = None
    if "health" in start:
        address, number = start["health"]
        health = HealthEndpoint(HealthAddress(*address), socket.socket(fileno=number))
    started = tuple(start["started"])
    _run(start.get("listener"), connection.detach(), launch, start["host"], settings, health, started)
    remove_address(start.get("addresses", ()))


def _ignore_signals() -> None:
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _run(
    listener: int | None,
    first: int,
    launch: LaunchInfo,
    host: str,
    settings: EarlySettings,
    health: HealthEndpoint | None,
    started: tuple[int, float, float],
) -> None:
    """Run the agent, in a process of its own, until the ranks of this node don't need it any more.

    Args:
        listener: the listening socket's descriptor; None if only one rank is watched.
        first: descriptor of the connection to the rank that started the agent.
        launch: how that rank was started.
        host: this node.
        settings: the agent's settings.
        health: where to answer health requests.
        started: that rank's process, and when it started, by both clocks.
    """
    import gc
    import socket

    from dynamo_mpi.common.process import forbid_core_dumps, set_process_title
    from dynamo_mpi.supervisor.node_agent import NodeAgent

    forbid_core_dumps()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if listener is None and launch.size != 1:
        # only this rank connects, so the others of this node aren't missing
        launch = launch._replace(local_size=None)
    observer = None
    if health is not None:
        from dynamo_mpi.telemetry.health_service import HealthService

        observer = HealthService(health, launch, host, settings.heartbeat_timeout, started)
    listening = None if listener is None else socket.socket(fileno=listener)
    agent = NodeAgent(listening, socket.socket(fileno=first), launch, host, settings, observer)
    set_process_title(f"dynamo_mpi: node agent on {host}")
    if observer is not None:
        observer.start()
    gc.enable()
    agent.run(started[1])


def _listen(addresses: tuple[str, ...], launch: LaunchInfo, *, wait_for_name: bool = False) -> _socket.socket:
    """Listen at one of the addresses; with ``wait_for_name``, wait up to 1 s until an agent that has just exited has released one."""
    end = time.monotonic() + (_NAME_SECONDS if wait_for_name else 0.0)
    while True:
        try:
            # all ranks of a node connect at the same moment
            return listen_for_ranks(addresses, max(_MIN_BACKLOG, launch.local_size or 0))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY_SECONDS)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        # don't wait for threads that still wait for etcd
        os._exit(0)
