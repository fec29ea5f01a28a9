# SPDX-License-Identifier: Apache-2.0
"""Errors about a rank as other processes observe them. Each text follows the rank's name."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, PhaseTimeoutError, RetryableError, UsageError

if TYPE_CHECKING:
    from dynamo_mpi.supervisor.rendezvous import Rendezvous


def rank_died(host: str) -> DynamoMpiError:
    """Return the error for a process that exited without reporting an error."""
    return EngineError(
        "died: its process exited without reporting an error",
        expected="every rank runs until the worker ends",
        fix="see the launcher's message below for the signal or exit code; signal 9 (code 137) that no user sent means out of memory: "
        f"check dmesg on {host}",
    )


def host_lost(host: str) -> DynamoMpiError:
    """Return the error for a host that doesn't answer."""
    return RetryableError(
        "is lost: its host doesn't answer",
        expected=f"{host} up and reachable over the network",
        fix=f"check whether {host} is up; start the worker again, without {host} if it is down",
    )


def heartbeat_missed(seconds: float, host: str) -> DynamoMpiError:
    """Return the error for a process that exists but sends no heartbeats."""
    return PhaseTimeoutError(
        f"is stopped or stuck: no heartbeat for {seconds:.0f} s",
        expected="a heartbeat within the timeout, which Python sends if it runs there",
        fix=f"look at the process on {host} (State in /proc/PID/status; py-spy dump); --heartbeat-timeout sets the timeout",
    )


def never_connected(seconds: float, rendezvous: Rendezvous) -> DynamoMpiError:
    """Return the error for a rank that never connected."""
    return RetryableError(
        f"has not connected to rank 0 within {seconds:.0f} s",
        expected=f"a TCP connection from every node to {rendezvous.host}, {rendezvous.address}, port {rendezvous.port}",
        fix="set --liveness-network to a network of all nodes, and open its TCP ports",
    )


def cannot_listen(address: str, error: OSError) -> DynamoMpiError:
    """Return the error for a rank 0 that can't listen."""
    fixes = {
        errno.EADDRNOTAVAIL: "set --liveness-network to an interface or network of this host, or correct the address of this host's name",
        errno.EADDRINUSE: "free some of this host's ports: all of net.ipv4.ip_local_port_range are taken",
        errno.EMFILE: "raise the limit of open files (ulimit -n) of rank 0's process",
        errno.ENFILE: "raise fs.file-max on this host, or end the processes that have so many files open",
    }
    return UsageError(
        f"rank 0 can't listen at {address} for the other ranks: {error.strerror or error}",
        expected="an address of this host with a free port",
        fix=fixes.get(error.errno or 0, "set --liveness-network to an address of this host that takes TCP connections"),
    )


def cannot_connect(rendezvous: Rendezvous, reason: str) -> DynamoMpiError:
    """Return the error for a rank 0 that can't be reached from this host."""
    return RetryableError(
        f"rank 0 on {rendezvous.host} can't be reached at {rendezvous.address}, port {rendezvous.port}: {reason}",
        expected="a TCP connection from every rank to rank 0",
        fix="if rank 0 died, its own report says why; otherwise set --liveness-network to a network of all nodes, and open its TCP ports",
    )
