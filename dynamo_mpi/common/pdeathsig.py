# SPDX-License-Identifier: Apache-2.0
"""Executes another program that is killed when its parent dies.

It is run by path (``python -I -S pdeathsig.py … -- COMMAND …``) and imports nothing of this package, so it costs little more than starting
an interpreter. Linux kills the process as soon as its parent exits, even if the parent got SIGKILL and could not clean up: neither a service
nor a rank is left behind.

With ``--rank-logs``, each rank writes to a log file of its own, whose name contains the rank, which separates the ranks' output.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
RANK_VARIABLES = ("PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def die_with_parent(expected_parent: int | None, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent exits.

    Args:
        expected_parent: exit at once if this is not the parent (any more). None for a rank, whose parent is a process of the launcher, of
            which it is only known that it isn't init.
        number: the signal.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # if the parent exited before prctl took effect, no signal is sent
    parent = os.getppid()
    if parent != expected_parent if expected_parent is not None else parent == 1:
        os._exit(128 + signal.SIGKILL)


def write_to_rank_log(folder: str) -> None:
    """Redirect stdout and stderr to this rank's file, unless the launcher sets no rank."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
    if rank is None:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    log = os.open(os.path.join(folder, f"rank-{int(rank)}.log"), flags, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int)
    parser.add_argument("--signal", type=int, default=signal.SIGKILL)
    parser.add_argument("--rank-logs")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent, arguments.signal)
    if arguments.rank_logs:
        write_to_rank_log(arguments.rank_logs)
    # Slurm sends its time limit warning to all processes of a step; only the parent decides how this process reacts
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        os.execvp(arguments.command[0], arguments.command)  # noqa: S606 - no shell is the point
    except OSError as error:
        print(f"cannot start {arguments.command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


if __name__ == "__main__":
    main()
