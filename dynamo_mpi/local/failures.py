# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a part, as errors that carry the part's own words."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.services.failures import LOG_LINES, PartError
from dynamo_mpi.services.logs import last_lines
from dynamo_mpi.services.processes import Child


class PartEnded(PartError):
    """A part ended although it was to go on."""

    @classmethod
    def of(cls, child: Child, rank_logs: Path | None = None) -> PartEnded:
        code = child.exit_code()
        found = f"{child.name} ended with exit code {code}"
        if rank_logs is None:
            return cls(found, part=child.name, status=ExitCode.UNAVAILABLE, log="\n".join(child.last_lines(LOG_LINES)))
        # A world that leaves by itself with code 0 has lost its lease, or stopped without being asked.
        return cls(found, part=child.name, status=code or ExitCode.ENGINE, log=worker_log(child, rank_logs))


class PartLate(PartError):
    """A part was not ready when the time was up."""

    @classmethod
    def of(cls, child: Child, state: str, seconds: float, rank_logs: Path | None = None) -> PartLate:
        log = "\n".join(child.last_lines(LOG_LINES)) if rank_logs is None else worker_log(child, rank_logs)
        found = f"{child.name} is not ready after {seconds:g} s: {state}"
        return cls(found, part=child.name, status=ExitCode.DEADLINE, log=log, fix="a longer --timeout, or --verbose")


def worker_log(child: Child, rank_logs: Path) -> str:
    """Return the worker's own words.

    An orderly end is one of our exit codes: rank 0 has reported for all, and its text stands alone, whole. After any
    other end each rank's last lines are shown, and the launcher's.
    """
    rank_zero = rank_logs / "rank-0.log"
    if child.exit_code() in set(ExitCode) and rank_zero.is_file():
        return rank_zero.read_text(errors="replace").rstrip("\n")
    sources = [*sorted(rank_logs.glob("rank-*.log")), child.log]
    return "\n".join(f"[{log.stem}] {line}" for log in sources for line in last_lines(log, LOG_LINES))
