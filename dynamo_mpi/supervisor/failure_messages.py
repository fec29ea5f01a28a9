# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a rank from outside, as errors. Each is told after the rank's name."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, PhaseTimeoutError, RetryableError, UsageError

if TYPE_CHECKING:
    from dynamo_mpi.supervisor.rendezvous import Rendezvous


def rank_died(host: str) -> DynamoMpiError:
    """Say that a process has ended without a word."""
    return EngineError(
        "died: its process ended without a word",
        needed="all ranks, until the worker ends",
        fix="the launcher says below by which signal or with which code it ended; where that is 9 (137) and nobody sent it, memory ran out: "
        f"look at dmesg on {host}",
    )


def host_lost(host: str) -> DynamoMpiError:
    """Say that a host is gone, or the network to it."""
    return RetryableError(
        "is lost: its host doesn't answer any more",
        needed=f"{host}, and the network to it",
        fix=f"see whether {host} is up, and start the worker again, without it if need be",
    )


def heartbeat_missed(seconds: float, host: str) -> DynamoMpiError:
    """Say that a process is there and says nothing."""
    return PhaseTimeoutError(
        f"is stopped or stuck: not a sign of life for {seconds:.0f} s",
        needed="a sign of life in time, for which Python has to run there",
        fix=f"look at the process on {host} (State in /proc/PID/status; py-spy dump); --heartbeat-timeout gives it longer",
    )


def never_connected(seconds: float, meeting: Rendezvous) -> DynamoMpiError:
    """Say that a rank has never come."""
    return UsageError(
        f"has not connected to rank 0 within {seconds:.0f} s",
        needed=f"a way to {meeting.host}, port {meeting.port} of {meeting.address}, from every node",
        fix="set --liveness-network to a network of all nodes, and let its TCP ports through",
    )


def cannot_listen(address: str, error: OSError) -> DynamoMpiError:
    """Say that rank 0 can't listen."""
    cures = {
        errno.EADDRNOTAVAIL: "set --liveness-network to an interface or network of this host, or correct what this host's name stands for",
        errno.EADDRINUSE: "free some of this host's ports: all of net.ipv4.ip_local_port_range are taken",
        errno.EMFILE: "raise the limit of open files (ulimit -n) of rank 0's process",
        errno.ENFILE: "raise fs.file-max on this host, or end what has so many files open",
    }
    return UsageError(
        f"rank 0 can't listen at {address} for the other ranks: {error.strerror or error}",
        needed="an address of this host, and a free port of it",
        fix=cures.get(error.errno or 0, "set --liveness-network to an address of this host that takes TCP connections"),
    )


def cannot_connect(meeting: Rendezvous, reason: str) -> DynamoMpiError:
    """Say that rank 0 can't be reached from here."""
    return UsageError(
        f"rank 0 on {meeting.host} can't be reached at {meeting.address}, port {meeting.port}: {reason}",
        needed="a TCP connection from every rank to rank 0",
        fix="if rank 0 has died, its own words say why; else set --liveness-network to a network of all nodes, and let its TCP ports through",
    )
