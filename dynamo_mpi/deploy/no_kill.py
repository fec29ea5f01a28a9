# SPDX-License-Identifier: Apache-2.0
"""Whether Slurm keeps the job when one of its nodes is lost: the allocation must be one of ``salloc`` or ``sbatch --no-kill``.

Slurm 22.05 shows it nowhere, neither by ``scontrol show job`` nor in a variable, so it is looked for where the user can have written it:
in the variables of salloc and sbatch, in salloc's command line, in the batch script.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SCONTROL_SECONDS = 5.0
_VARIABLES = ("SALLOC_NO_KILL", "SBATCH_NO_KILL", "DYN_MPI_NO_KILL")
# salloc(1), sbatch(1): -k, --no-kill[=off]
_OPTION = re.compile(r"(?:^|\s)(?:--no-kill(?:=(?P<value>\w+))?|-k)(?=\s|$)")
_DIRECTIVE = re.compile(r"^#SBATCH\s+(.*)$", re.MULTILINE)
_MOST_PARENTS = 64


def warning(environ: Mapping[str, str]) -> str:
    """Return what to say to the user of spare nodes; empty if the job goes on without a lost node."""
    kept = is_kept(environ)
    if kept:
        return ""
    job = environ.get("SLURM_JOB_ID", "")
    found = (
        f"job {job} was allocated without --no-kill: Slurm ends it when a node is lost"
        if kept is False
        else f"it isn't known whether job {job} was allocated with --no-kill: without it, Slurm ends the job when a node is lost"
    )
    return (
        f"{found}\n  expected: an allocation that outlives a node\n"
        "  fix:      salloc --no-kill, sbatch --no-kill, or #SBATCH --no-kill; spare nodes still help where a node is unhealthy"
    )


def is_kept(environ: Mapping[str, str]) -> bool | None:
    """Return whether the job has ``--no-kill``; None if that isn't known."""
    for name in _VARIABLES:
        if name in environ:
            return environ[name].lower() not in ("off", "no")
    for words in _command_lines():
        if Path(words[0]).name == "salloc":
            return says_no_kill(" ".join(words[1:]))
    script = _batch_script(environ.get("SLURM_JOB_ID", ""))
    return True if says_no_kill("\n".join(_DIRECTIVE.findall(script))) else None


def says_no_kill(options: str) -> bool:
    """Return whether a line of options has ``--no-kill``."""
    found = [match["value"] for match in _OPTION.finditer(options)]
    return bool(found) and (found[-1] or "").lower() not in ("off", "no")


def _command_lines() -> Iterator[Sequence[str]]:
    """Yield the command lines of this process's parents, the nearest first: salloc is one of them in its shell."""
    pid = "self"
    for _ in range(_MOST_PARENTS):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            pid = stat.rpartition(")")[2].split()[1]
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError):
            return
        if words and words[0]:
            yield [word.decode(errors="replace") for word in words]
        if pid in ("0", "1"):
            return


def _batch_script(job_id: str) -> str:
    """Return the job's batch script; empty if it has none, or Slurm doesn't answer."""
    try:
        done = subprocess.run(
            ("scontrol", "write", "batch_script", job_id, "-"),
            capture_output=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
