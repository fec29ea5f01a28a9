# SPDX-License-Identifier: Apache-2.0
"""Starts the agent of a node's ranks: forked before MPI, and as a new process where that one has ended. Imported before the verdict."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dynamo_mpi.supervisor.agent_client import Agent
from dynamo_mpi.supervisor.agent_socket import agent_socket_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.mpi.launcher import LaunchInfo

# what a launcher or an operator sends to all processes of a step: the agent stays to the end of its ranks
_NOT_FOR_IT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_LEAST_BACKLOG = 128
_NAME_SECONDS = 1.0
_AGAIN_SECONDS = 0.01


def spawn_node_agent(launch: LaunchInfo, host: str, argv: Sequence[str], environ: Mapping[str, str]) -> Agent | None:
    """Fork the agent of this node, if that is for this rank to do. Only before MPI and any thread is started. Does not raise.

    Args:
        launch: how this rank was started.
        host: this node.
        argv: the worker's command line, without the program.
        environ: names the world, and holds the agent's settings.

    Returns:
        The agent; None where another rank of this node starts it, or there is none.
    """
    address = agent_socket_name(launch, environ)
    if launch.local_rank not in (0, None) or (launch.local_rank is None and launch.rank):
        return None
    if not address and launch.size != 1:
        return None
    try:
        listener = _listen(address, launch) if address else None
        ours, its = _socket.socketpair()
        pid = os.fork()
    except OSError as error:
        why = "another program holds its address" if error.errno == errno.EADDRINUSE else error.strerror
        warn(f"no node agent watches the ranks of this node: {why}", host)
        return None
    if pid:
        for each in (listener, its):
            if each is not None:
                each.close()
        return Agent(ours, pid)
    try:
        ours.close()
        os.setsid()
        # in this process, not in a new interpreter: it must be there before the first rank dies
        _be_the_agent(None if listener is None else listener.detach(), its.detach(), launch, host, argv, environ)
    except BaseException as error:  # whatever it is, this process must not go on as a rank
        warn(f"the node agent of {host} has failed: {type(error).__name__}: {error}", host)
    finally:
        os._exit(0)


def respawn_node_agent(launch: LaunchInfo, host: str, argv: Sequence[str], environ: Mapping[str, str]) -> Agent | None:
    """Start another agent after the one that this rank has started: as a new process, since MPI and threads run in this one.

    Args:
        launch: as for `spawn_node_agent`, like the rest.
        host: this node.
        argv: the worker's command line, without the program.
        environ: names the world, and holds the agent's settings.

    Returns:
        The agent; None where it can't be started.
    """
    import json
    import subprocess
    from pathlib import Path

    from dynamo_mpi.supervisor.descendants import MARK_VARIABLE

    address = agent_socket_name(launch, environ)
    listener: _socket.socket | None = None
    try:
        ours, its = _socket.socketpair()
        listener = _listen(address, launch, patient=True) if address else None
        numbers = [each.fileno() for each in (its, listener) if each is not None]
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, environ.get("PYTHONPATH"))))
        # it is no descendant that ends with this rank
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
    its.close()
    start = {"launch": [launch.launcher.name, *launch[1:5]], "host": host, "argv": list(argv)}
    with contextlib.suppress(OSError):
        ours.sendall(json.dumps(start).encode() + b"\n")
    # `Popen` would say at this object's end that its process still runs
    process.returncode = 0
    return Agent(ours, process.pid)


def main(first: str, listener: str | None = None) -> None:
    """Be an agent that was started by `respawn_node_agent`."""
    import json

    from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo

    connection = _socket.socket(fileno=int(first))
    line = b""
    # what comes behind it is for the agent
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    start = json.loads(line)
    name, *rest = start["launch"]
    launch = LaunchInfo(Launcher[name], *rest)
    at = None if listener is None else int(listener)
    _be_the_agent(at, connection.detach(), launch, start["host"], start["argv"], os.environ)


def _be_the_agent(
    listener: int | None, first: int, launch: LaunchInfo, host: str, argv: Sequence[str], environ: Mapping[str, str]
) -> None:
    for number in _NOT_FOR_IT:
        signal.signal(number, signal.SIG_IGN)
    from dynamo_mpi.supervisor.node_agent import run_node_agent

    run_node_agent(listener, first, launch, host, argv, environ)


def _listen(address: str, launch: LaunchInfo, *, patient: bool = False) -> _socket.socket:
    """Listen there; one that is ``patient`` waits a moment for the name of an agent that has just ended."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    end = time.monotonic() + (_NAME_SECONDS if patient else 0.0)
    while True:
        try:
            listener.bind(address)
            # all ranks of a node come at the same moment
            listener.listen(max(_LEAST_BACKLOG, launch.local_size or 0))
            return listener
        except OSError:
            if time.monotonic() > end:
                listener.close()
                raise
            time.sleep(_AGAIN_SECONDS)


def warn(text: str, host: str = "") -> None:
    """Log a warning of this node's. Does not raise."""
    with contextlib.suppress(Exception):  # a file system that has gone, say
        from dynamo_mpi.common.log_levels import Level
        from dynamo_mpi.common.log_writer import log_writer

        log_writer.emit(None, host or os.uname().nodename.partition(".")[0], f"warning: {text}", Level.WARN)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        # threads that still wait for etcd are no reason to stay
        os._exit(0)
