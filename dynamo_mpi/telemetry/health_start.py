# SPDX-License-Identifier: Apache-2.0
"""Starts a node's health server before MPI, so that a pod is alive from its first second.

Imported only if ``DYN_SYSTEM_PORT`` is set.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.mpi.restart_count import restart_count
from dynamo_mpi.telemetry.health_address import HOST_VARIABLE, PORT_VARIABLE, HealthAddress
from dynamo_mpi.telemetry.health_client import HealthClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.mpi.launcher import LaunchInfo

# signals that a launcher or an operator sends to all processes of a step: the server runs until its rank ends
_NOT_FOR_IT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_BACKLOG = 128
_MOST_FILES = 1 << 20


def start_health_server(
    launch: LaunchInfo, log: RankLogger, heartbeat_timeout: float | None, environ: Mapping[str, str]
) -> HealthClient | UsageError | None:
    """Fork this node's health server, if this rank is the one that must. Call it before MPI and any thread is started.

    Args:
        launch: how this rank was started.
        log: logs a warning if the health server of a node other than rank 0's can't start.
        heartbeat_timeout: see `Rendezvous`.
        environ: has the address.

    Returns:
        The client to send this rank's state; None if there is no server; an error if rank 0's server can't start.
    """
    if launch.rank and launch.local_rank != 0:
        return None
    try:
        address = HealthAddress.of(environ)
        if address is None:
            return None
        listener = _listen(address)
    except UsageError as error:
        if launch.rank == 0:
            return error
        log.warning(f"this node has no health server: {error}")
        return None
    where = address._replace(port=listener.getsockname()[1])
    # a signal that arrives meanwhile is delivered only to this rank
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)
    try:
        ours, its = socket.socketpair()
        pid = os.fork()
    except OSError as error:  # too many processes or files of this user: the worker serves without a health server
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        listener.close()
        log.warning(f"this node has no health server: {error.strerror}")
        return None
    if pid == 0:
        for number in _NOT_FOR_IT:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _serve(where, listener, its, launch, log, heartbeat_timeout, environ)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    listener.close()
    its.close()
    return HealthClient(ours, where, pid, heartbeat_timeout)


def _listen(address: HealthAddress) -> socket.socket:
    host = address.host.strip("[]")
    try:
        if host == "::" and socket.has_dualstack_ipv6():
            return socket.create_server(
                (host, address.port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        family, *_, place = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        from dynamo_mpi.common.ports import holder

        who = holder(address.port) if address.port else None
        why = f"{who} listens there" if who else error.strerror or str(error)
        raise UsageError(
            f"{PORT_VARIABLE}={address.port}: /health, /live and /metrics can't be served at {address.host}:{address.port}: {why}",
            needed=f"a free port on every node, and an address of each in {HOST_VARIABLE}",
            fix=f"free it, or choose another {PORT_VARIABLE}; of two workers on a node, each needs its own",
        ) from None


def _serve(
    address: HealthAddress,
    listener: socket.socket,
    rank: socket.socket,
    launch: LaunchInfo,
    log: RankLogger,
    heartbeat_timeout: float | None,
    environ: Mapping[str, str],
) -> None:
    """Run the forked process. Does not return."""
    parent = os.getppid()
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(null, descriptor)
        # inherited connections of the rank must be closed: an open one to the node agent would look like a running rank
        first, second = sorted((listener.fileno(), rank.fileno()))
        for low, high in ((3, first), (first + 1, second), (second + 1, _MOST_FILES)):
            os.closerange(low, high)
        from dynamo_mpi.common.process import set_process_title
        from dynamo_mpi.telemetry.health_server import HealthServer
        from dynamo_mpi.telemetry.health_state import HealthState

        now, wall = time.monotonic(), time.time()
        state = HealthState(launch.rank, log.host, parent, wall, now, restart_count(environ), since=wall, last_seen=now)
        set_process_title(f"dynamo_mpi: answers probes on {log.host}")
        state = state._replace(heartbeat_timeout=heartbeat_timeout)
        HealthServer(address, state, listener).serve(rank)
    except BaseException as error:  # in any case this process must not continue as a rank
        text = str(error) if isinstance(error, DynamoMpiError) else f"{type(error).__name__}: {error}"
        log.warning(f"this node's health server has ended: {text}")
    finally:
        os._exit(0)
