# SPDX-License-Identifier: Apache-2.0
"""Starts a node's agent: forked before MPI_Init, its successors as new processes. Imported before the preflight result."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dynamo_mpi.config.sources import EarlySettings
from dynamo_mpi.supervisor.agent_client import Agent
from dynamo_mpi.supervisor.agent_socket import agent_socket_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.mpi.launcher import LaunchInfo

# signals that a launcher or an operator sends to all processes of a step: the agent must outlive its ranks
_IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MIN_BACKLOG = 128
_NAME_SECONDS = 1.0
_RETRY_SECONDS = 0.01


def spawn_node_agent(
    launch: LaunchInfo, host: str, settings: EarlySettings, environ: Mapping[str, str]
) -> Agent | None:
    """Fork the agent of this node if this rank is the node's first. Call it before MPI and any thread is started. Does not raise.

    Args:
        launch: how this rank was started.
        host: this node.
        settings: the agent's settings.
        environ: environment variables; they identify the world.

    Returns:
        The agent; None if another rank of this node starts it, or if it can't be started.
    """
    address = agent_socket_name(launch, environ)
    if launch.local_rank not in (0, None) or (launch.local_rank is None and launch.rank):
        return None
    if not address and launch.size != 1:
        return None
    try:
        listener = _listen(address, launch) if address else None
        rank_end, agent_end = _socket.socketpair()
        pid = os.fork()
    except OSError as error:
        why = "another program holds its address" if error.errno == errno.EADDRINUSE else error.strerror
        warn(f"no node agent watches the ranks of this node: {why}", host)
        return None
    if pid:
        for each in (listener, agent_end):
            if each is not None:
                each.close()
        return Agent(rank_end, pid)
    try:
        rank_end.close()
        os.setsid()
        # in this process: a new interpreter would start too late to see an early death
        _run_agent(None if listener is None else listener.detach(), agent_end.detach(), launch, host, settings)
    except BaseException as error:  # after any error, this process must not go on as a rank
        warn(f"the node agent of {host} has failed: {type(error).__name__}: {error}", host)
    finally:
        os._exit(0)


def respawn_node_agent(
    launch: LaunchInfo, host: str, settings: EarlySettings, environ: Mapping[str, str]
) -> Agent | None:
    """Start a successor of the agent that this rank started: as a new process, because MPI and threads run in this one.

    Args:
        launch: how this rank was started.
        host: this node.
        settings: the agent's settings.
        environ: environment variables; they identify the world.

    Returns:
        The agent; None if it can't be started.
    """
    import json
    import subprocess
    from pathlib import Path

    from dynamo_mpi.supervisor.descendants import MARK_VARIABLE

    address = agent_socket_name(launch, environ)
    listener: _socket.socket | None = None
    try:
        rank_end, agent_end = _socket.socketpair()
        listener = _listen(address, launch, wait_for_name=True) if address else None
        numbers = [each.fileno() for each in (agent_end, listener) if each is not None]
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, environ.get("PYTHONPATH"))))
        # without the mark: the agent must not be ended with this rank's descendants
        variables = {name: value for name, value in environ.items() if name != MARK_VARIABLE}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, numbers)],
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
    start = {"launch": [launch.launcher.name, *launch[1:5]], "host": host, "settings": list(settings)}
    with contextlib.suppress(OSError):
        rank_end.sendall(json.dumps(start).encode() + b"\n")
    # otherwise `Popen` warns, when the object is deleted, that its process still runs
    process.returncode = 0
    return Agent(rank_end, process.pid)


def main(first: str, listener: str | None = None) -> None:
    """Run as an agent that `respawn_node_agent` started."""
    import json

    from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo

    connection = _socket.socket(fileno=int(first))
    line = b""
    # read byte by byte: what follows the line is for the agent
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    start = json.loads(line)
    name, *rest = start["launch"]
    launch = LaunchInfo(Launcher[name], *rest)
    listening = None if listener is None else int(listener)
    _run_agent(listening, connection.detach(), launch, start["host"], EarlySettings(*start["settings"]))


def _run_agent(listener: int | None, first: int, launch: LaunchInfo, host: str, settings: EarlySettings) -> None:
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    from dynamo_mpi.supervisor.node_agent import run_node_agent

    run_node_agent(listener, first, launch, host, settings)


def _listen(address: str, launch: LaunchInfo, *, wait_for_name: bool = False) -> _socket.socket:
    """Listen at the address; with ``wait_for_name``, wait up to 1 s until an agent that has just exited has released it."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    end = time.monotonic() + (_NAME_SECONDS if wait_for_name else 0.0)
    while True:
        try:
            listener.bind(address)
            # all ranks of a node connect at the same moment
            listener.listen(max(_MIN_BACKLOG, launch.local_size or 0))
            return listener
        except OSError:
            if time.monotonic() > end:
                listener.close()
                raise
            time.sleep(_RETRY_SECONDS)


def warn(text: str, host: str = "") -> None:
    """Log a warning about this node. Does not raise."""
    with contextlib.suppress(Exception):  # for instance, the file system is gone
        from dynamo_mpi.common.log_record import Level
        from dynamo_mpi.common.log_writer import log_writer

        log_writer.emit(None, host or os.uname().nodename.partition(".")[0], f"warning: {text}", Level.WARN)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        # don't wait for threads that still wait for etcd
        os._exit(0)
