# SPDX-License-Identifier: Apache-2.0
"""What is said about a rank's failure: errors as other processes observe them, and a JSON file per failed rank, for programs that supervise
many workers. Each text follows the rank's name. Rank 0's file holds the whole report.
"""

from __future__ import annotations

import errno
import json
import os
import time

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, PhaseTimeoutError, RetryableError, UsageError
from dynamo_mpi.common.failure import ENDED_BY_MPI, OPEN_MPI_ABORT
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.mpi.launcher import MPICH_LAUNCHERS, restart_count

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.mpi.launcher import Launcher
    from dynamo_mpi.supervisor.rendezvous import Rendezvous


def rank_died(host: str, phase: str = "") -> DynamoMpiError:
    """Return the error for a process that exited without reporting an error; in the phase ``mpi_init``, mostly MPI has ended it."""
    if phase == "mpi_init":
        return EngineError(
            "died while MPI started: its process exited without reporting an error",
            expected="an MPI library that starts",
            fix="read MPI's own lines in the output beside this report; with none there, its exit code or signal in the output of what "
            "started the process (srun, mpirun, the container runtime)",
        )
    return EngineError(
        "died: its process exited without reporting an error",
        expected="every rank runs until the worker ends",
        fix="look for the signal or exit code in the output of what started the process (srun, mpirun, the container runtime). Signal 9 "
        f"(code 137) that no user sent may mean out of memory: check dmesg on {host}. TensorRT-LLM also kills all ranks after a crash "
        "or a hang: read its last lines",
    )


def rank_ended(host: str, phase: str, status: int | None, launcher: Launcher) -> DynamoMpiError:
    """Return the error for a process that exited without reporting one.

    Args:
        host: its host.
        phase: its phase.
        status: its wait status; None if it isn't known.
        launcher: what started it.
    """
    if status != OPEN_MPI_ABORT or phase == "mpi_init" or launcher in MPICH_LAUNCHERS:
        return rank_died(host, phase)
    return EngineError(
        f"died: {ENDED_BY_MPI} (exit code 14)",
        expected="every rank runs until the worker ends",
        fix="look for a rank of another host that ended first, in the output of what started them, and at the network between the hosts",
    )


def died_with_agent(host: str) -> DynamoMpiError:
    """Return the error for the first rank of a node whose node agent is lost and not replaced: that rank would have started another."""
    return EngineError(
        "died together with its node agent: both were killed at once, or their host was",
        expected="every rank runs until the worker ends",
        fix=f"check whether {host} is up and was restarted, and dmesg there: a job that is out of memory may lose all its processes",
    )


def host_lost(host: str) -> DynamoMpiError:
    """Return the error for a host that doesn't answer."""
    return RetryableError(
        "is lost: its host doesn't answer",
        expected=f"{host} up and reachable over the network",
        fix=f"check whether {host} is up; start the worker again, without {host} if it is down",
    )


SILENT_HOST = "its host has acknowledged nothing for"
"""`dynamo-mpi launch` looks at the worker's nodes when a rank's output has this."""


def silent_host(seconds: float) -> str:
    """Return the warning about a rank whose host may be lost."""
    return f"its host has acknowledged nothing for {seconds:.0f} s: it is lost, or the network between the hosts is"


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


def no_verdict(seconds: float) -> DynamoMpiError:
    """Return the error for a start without a preflight result."""
    return PhaseTimeoutError(
        f"no verdict after {seconds:g} s",
        expected="all ranks of all nodes must start MPI and answer rank 0",
        fix="look at the ranks and nodes that are missing or differ from the others; --world-timeout sets the time",
    )


def too_late(what: str, seconds: float, flag: str) -> PhaseTimeoutError:
    """Return the error for what takes longer than its time limit; ``flag`` sets the limit, if there is one."""
    return PhaseTimeoutError(
        f"{what} after {seconds:g} s",
        expected="all ranks must finish in time",
        fix=f"look at the ranks that differ from the others{f'; {flag} gives it longer' if flag else ''}",
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


def load_writer() -> None:
    """Import what `write_failure` needs, while that can be imported: the file system of a container may go with a rank."""
    import dynamo_mpi.common.own_files
    import dynamo_mpi.common.trace_context  # noqa: F401


def write_failure(
    rendezvous: Rendezvous,
    failure: Failure,
    host: str,
    *,
    by: int | None = None,
    report: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> None:
    """Write a failure file if a failure directory is configured. Does not raise if it can't be written, but logs a warning.

    Args:
        rendezvous: names the directory.
        failure: the failure.
        host: the host where it happened.
        by: the rank whose file it becomes; None for the rank that failed.
        report: additional keys, from rank 0.
        keep: don't replace an existing file: hosts cut off from each other may share the directory, and rank 0's side knows more.
    """
    if not rendezvous.failure_dir:
        return
    # not before the result: what an agent imports delays its watch
    from dynamo_mpi.common.folder_walk import reason
    from dynamo_mpi.common.own_files import make_folder, write_own

    content = _without_secrets({**as_document(failure, host), **(report or {})})
    path = _path(rendezvous, failure.rank if by is None else by)
    try:
        if keep and path.exists():
            return
        make_folder(path.parent)
        write_own(path, f"{json.dumps(content)}\n".encode())
    except OSError as error:
        from dynamo_mpi.supervisor.agent_socket import warn

        warn(f"the failure file {path} can't be written: {reason(error)}")


def as_document(failure: Failure, host: str) -> dict[str, Any]:
    """Return the JSON content of a failure file; ``traceback`` is null if the error is not a traceback."""
    from dynamo_mpi.common.trace_context import trace_of

    is_traceback = failure.text.startswith("Traceback")
    return {
        "rank": failure.rank,
        "host": host,
        "phase": failure.phase,
        "cause": failure.cause.name.lower(),
        "exit_code": failure.exit_code,
        "error": failure.text.rstrip().rpartition("\n")[2] if is_traceback else failure.text,
        "traceback": failure.text if is_traceback else None,
        "time": time.time() - (time.monotonic() - failure.at),
        "sequence": failure.sequence,
        "attempt": restart_count(os.environ),
        "trace_id": None if (trace := trace_of(os.environ)) is None else trace.trace_id,
    }


def remove_stale_failure_files(folder: Path | None, label: str) -> str:
    """Remove the failure files of an earlier start of this worker; return why none can be written, or an empty text."""
    if folder is None:
        return ""
    # the directory is created only when it is needed
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"no failure files: {existing} is no folder that can be written; correct --failure-dir"
    from dynamo_mpi.common.folder_walk import UnsafeFileError, reason
    from dynamo_mpi.common.own_files import OwnFolder

    try:
        with OwnFolder(folder) as opened:
            for name in opened.names():
                if name.startswith(f"{label}-rank-") and name.endswith(".json"):
                    opened.remove(name)
    except UnsafeFileError as error:
        return f"no failure files: {reason(error)}"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"failure files of an earlier start can't be removed from {folder}: {reason(error)}"
    return ""


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return process_redactor().redact(value)
    if isinstance(value, dict):
        return {name: _without_secrets(each) for name, each in value.items()}
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value


def _path(rendezvous: Rendezvous, rank: int) -> Path:
    from pathlib import Path

    return Path(rendezvous.failure_dir) / f"{rendezvous.label}-rank-{rank}.json"
