# SPDX-License-Identifier: Apache-2.0
"""Begins to answer a node's probes: before MPI, so that a pod is alive from its first second on.

Imported only where ``DYN_SYSTEM_PORT`` is set.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.mpi.restart_count import restart_count
from dynamo_mpi.supervisor.early_settings import Limits
from dynamo_mpi.telemetry.health_address import HOST_VARIABLE, PORT_VARIABLE, HealthAddress
from dynamo_mpi.telemetry.health_client import HealthClient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.mpi.launcher import LaunchInfo

# what a launcher or an operator sends to all processes of a step: this one stays to the end of its rank
_NOT_FOR_IT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_BACKLOG = 128
_MOST_FILES = 1 << 20


def start_health_server(
    launch: LaunchInfo, log: RankLogger, argv: Sequence[str], environ: Mapping[str, str]
) -> HealthClient | UsageError | None:
    """Fork the process that answers this node's probes, if that is for this rank to do. Only before MPI and any thread is started.

    Args:
        launch: how this rank was started.
        log: says that a node other than rank 0's has no answers.
        argv: the worker's command line, without the program.
        environ: says where to answer.

    Returns:
        What takes word of this rank; None where there are no answers; for rank 0 an error, where there should be.
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
        log.warning(f"no probe of this node is answered: {error}")
        return None
    limits = Limits.of(argv, environ)
    where = address._replace(port=listener.getsockname()[1])
    # one that comes meanwhile comes to this rank alone
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)
    try:
        ours, its = socket.socketpair()
        pid = os.fork()
    except OSError as error:  # too many processes or files of this user: probes are no reason not to serve
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        listener.close()
        log.warning(f"no probe of this node is answered: {error.strerror}")
        return None
    if pid == 0:
        for number in _NOT_FOR_IT:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _serve(where, listener, its, launch, log, limits, environ)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    listener.close()
    its.close()
    return HealthClient(ours, where, pid, limits.heartbeat_timeout)


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
    limits: Limits,
    environ: Mapping[str, str],
) -> None:
    """Live the life of the process that was forked. Does not return."""
    parent = os.getppid()
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(null, descriptor)
        # what it holds of the rank's would look as if that lived on: its connection to the node agent, above all
        first, second = sorted((listener.fileno(), rank.fileno()))
        for low, high in ((3, first), (first + 1, second), (second + 1, _MOST_FILES)):
            os.closerange(low, high)
        from dynamo_mpi.common.process_title import set_process_title
        from dynamo_mpi.telemetry.health_server import HealthServer
        from dynamo_mpi.telemetry.health_state import HealthState

        now, wall = time.monotonic(), time.time()
        state = HealthState(launch.rank, log.host, parent, wall, now, restart_count(environ), since=wall, heard=now)
        set_process_title(f"dynamo_mpi: answers probes on {log.host}")
        state = state._replace(heartbeat_timeout=limits.heartbeat_timeout)
        HealthServer(address, state, listener).serve(rank)
    except BaseException as error:  # whatever it is, this process must not go on as a rank
        text = str(error) if isinstance(error, DynamoMpiError) else f"{type(error).__name__}: {error}"
        log.warning(f"no probe of this node is answered any more: {text}")
    finally:
        os._exit(0)
