# SPDX-License-Identifier: Apache-2.0
"""What doctor's probes get, and what they return: the context, and a check with its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, detect_launcher

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.common.errors import DynamoMpiError


class Status(Enum):
    """Result of a check. Only an error stops a worker."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    SKIPPED = "skipped"


class Check(NamedTuple):
    """One check.

    Args:
        id: its name for scripts, stable within its section.
        status: the result.
        found: what was found; for a skipped check, the reason.
        expected: what is expected; empty if it is ok.
        fix: the fix.
        code: for an error, the exit code of the command.
    """

    id: str
    status: Status
    found: str
    expected: str = ""
    fix: str = ""
    code: ExitCode = ExitCode.OK

    def as_json(self) -> dict[str, str]:
        """Return it as plain data."""
        return {
            "id": self.id,
            "status": self.status.value,
            "found": self.found,
            "needed": self.expected,
            "fix": self.fix,
        }


def ok(id: str, found: str) -> Check:
    """Return a check without a problem."""
    return Check(id, Status.OK, found)


def skipped(id: str, why: str, fix: str = "") -> Check:
    """Return a check that can't run here."""
    return Check(id, Status.SKIPPED, why, fix=fix)


def warning(id: str, found: str, expected: str, fix: str = "") -> Check:
    """Return a check with a problem that does not stop a worker."""
    return Check(id, Status.WARNING, found, expected, fix)


def error(id: str, found: str, expected: str, fix: str = "", code: ExitCode = ExitCode.USAGE) -> Check:
    """Return a check with a problem that stops a worker."""
    return Check(id, Status.ERROR, found, expected, fix, code)


def error_or_warning(
    id: str, found: str, expected: str, fix: str = "", *, fatal: bool, code: ExitCode = ExitCode.USAGE
) -> Check:
    """Return an error if ``fatal``, otherwise a warning."""
    return error(id, found, expected, fix, code) if fatal else warning(id, found, expected, fix)


def of_error(id: str, problem: DynamoMpiError, *, fatal: bool = True) -> Check:
    """Return the check for an error with which a worker would end."""
    return error_or_warning(id, problem.problem, problem.expected, problem.fix, fatal=fatal, code=problem.exit_code)


def of_finding(id: str, finding: Finding) -> Check:
    """Return the check for a finding of a preflight rule."""
    text = f"{finding.message}: {finding.found}" if finding.found else finding.message
    if finding.severity is Severity.INFO:
        return ok(id, text)
    return error_or_warning(id, text, finding.expected, finding.fix, fatal=finding.severity is Severity.ERROR)


CALL_SECONDS = 5.0
"""Default time limit of a call to another program or server: a busy Slurm controller answers in one or two seconds."""
# reserved at the end, so that a probe can report that it got no answer
_SHARE = 0.9
_ALONE = LaunchInfo(Launcher.ALONE)
# Slurm's own steps: batch scripts, interactive shells
_SPECIAL_STEPS = 0xFFFFFFF0
_RANKS = frozenset(Launcher) - {Launcher.ALONE, Launcher.SLURM_SHELL}


@dataclass(frozen=True)
class Context:
    """The context of all probes.

    Args:
        environ: the environment of this process.
        started: the start, by `time.monotonic`.
        seconds: time limit of the whole run.
        run_dir: a deployment's folder.
        write: whether a key may be written to etcd as a test.
        launch: what started this process.
    """

    environ: Mapping[str, str]
    started: float = field(default_factory=time.monotonic)
    seconds: float = 10.0
    run_dir: Path | None = None
    write: bool = False
    launch: LaunchInfo = _ALONE

    @classmethod
    def of(
        cls, environ: Mapping[str, str], seconds: float, run_dir: Path | None = None, write: bool = False
    ) -> Context:
        """Return the context of this process, with the time limit from now on."""
        launch = detect_launcher(environ)
        if launch.launcher is Launcher.SRUN_WITHOUT_MPI and _is_shell(environ):
            launch = launch._replace(launcher=Launcher.SLURM_SHELL)
        return cls(environ, time.monotonic(), seconds, run_dir, write, launch)

    @property
    def in_rank(self) -> bool:
        """Whether this process runs in the place of a rank, so that what is missing here is also missing for ranks."""
        return self.launch.launcher in _RANKS

    @property
    def end(self) -> float:
        """The deadline of the last probe, by `time.monotonic`."""
        return self.started + self.seconds * _SHARE

    def left(self, most: float = CALL_SECONDS) -> float:
        """Return the seconds that a call may take from now on; always more than 0."""
        return max(0.01, min(most, self.end - time.monotonic()))


def _is_shell(environ: Mapping[str, str]) -> bool:
    """Return whether this task is an interactive shell (``srun --pty bash``, or ``salloc`` if Slurm starts its shell on a node)."""
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PTY_PORT" in environ or (step.isdecimal() and int(step) >= _SPECIAL_STEPS)


class Probe(NamedTuple):
    """One probe, which runs in a thread.

    Args:
        id: its id; the check that reports a timeout has the same.
        ask: yields the checks.
    """

    id: str
    ask: Callable[[Context], Iterable[Check]]


class Section(NamedTuple):
    """A group of probes.

    Args:
        name: for ``--only`` and the heading.
        probes: the probes, in the order of the report.
    """

    name: str
    probes: tuple[Probe, ...]
