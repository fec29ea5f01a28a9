# SPDX-License-Identifier: Apache-2.0
"""Facts about this host and its processes. Every rank imports it before the preflight result."""

from __future__ import annotations

import os
import signal

DRAIN_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1)
"""They ask for an orderly end, as ``--signal`` of a batch job does before its time limit. SIGUSR1 stays for one release: NCCL and a batch
job's submitter may use it themselves."""
SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT, *DRAIN_SIGNALS)


def host_name() -> str:
    """Return this node's short name, as in Slurm."""
    return os.uname().nodename.partition(".")[0]


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by a signal or a debugger."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
