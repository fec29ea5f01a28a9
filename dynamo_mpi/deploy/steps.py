# SPDX-License-Identifier: Apache-2.0
"""Running steps, and how to end them under Slurm and under mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dynamo_mpi.common.own_files import read_own
from dynamo_mpi.common.subprocess import LoggedProcess
from dynamo_mpi.common.worker_process import ProcessStart, signal_worker
from dynamo_mpi.deploy.hostlist import expand
from dynamo_mpi.deploy.step_commands import STEP_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.step_commands import Command

_SLURM_SECONDS = 20.0
# scancel hands a signal to the nodes itself: to those that answer at once, then it waits for the others
_SIGNAL_SECONDS = 5.0
# nothing else is looked at meanwhile; without an answer srun is asked to end the step
_CANCEL_SECONDS = 5.0
# of a launcher after the end of its ranks; srun waits KillWait + 2 s for a node that doesn't answer, by default 32 s
REST_SECONDS = 3.0


@dataclass(frozen=True)
class Step:
    """A started command.

    Args:
        command: the command.
        child: the process of srun, mpirun or the services on this host.
        ready_file: the file that a worker writes when it serves; None for the services.
    """

    command: Command
    child: LoggedProcess
    ready_file: Path | None = None

    @property
    def name(self) -> str:
        return self.command.name

    def last_words(self, lines: int = 40) -> str:
        """Return the last lines of its output."""
        return "\n".join(self.child.last_lines(lines))


class StepController(Protocol):
    """Ends steps."""

    def signal(self, steps: Sequence[Step]) -> None:
        """Request that steps drain and end."""

    def why_not_drained(self, step: Step) -> str:
        """Return why `signal` would end a step's requests in flight; empty if it drains."""

    def cancel(self, steps: Sequence[Step]) -> None:
        """End steps now, on all nodes that answer. It may take some seconds: call it once for several steps."""


class StepEnd:
    """Ends the rest of a step whose failure is known: its ranks everywhere, and its launcher, which may wait for a lost node. Doesn't block.

    Args:
        step: the step.
        step_controller: ends its ranks.
        seconds: time that the launcher has to exit by itself; with 0 it is killed at once.
    """

    def __init__(self, step: Step, step_controller: StepController, seconds: float = REST_SECONDS) -> None:
        self.step, self._deadline = step, time.monotonic() + seconds
        step_controller.cancel([step])
        self.poll()

    def poll(self) -> bool:
        """Return whether the launcher has ended; after its time, kill it."""
        if self.step.child.exit_code() is None and time.monotonic() >= self._deadline:
            self.step.child.kill()
        return self.step.child.exit_code() is not None


def start(command: Command, environment: Mapping[str, str], log: Path, ready_file: Path | None = None) -> Step:
    """Start a step. Call it from the main thread; the step ends when this process ends, for any reason."""
    child = LoggedProcess(
        command.name,
        command.words,
        environment={**environment, **command.environment},
        log=log,
        # SIGKILL would end only srun, and leave its ranks running
        end_with=signal.SIGTERM,
    )
    return Step(command, child, ready_file)


class SlurmStepController:
    """Ends steps by their ids: srun itself forwards no signal that makes ranks drain.

    Args:
        job_id: the job that they belong to.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._cancelled: set[str] = set()

    def signal(self, steps: Sequence[Step]) -> None:
        self._scancel(steps, self._cancelled, "--signal=TERM")

    def why_not_drained(self, step: Step) -> str:
        return ""

    def cancel(self, steps: Sequence[Step]) -> None:
        self._cancelled.update(self._scancel(steps, self._cancelled, seconds=_CANCEL_SECONDS))

    def _scancel(
        self, steps: Sequence[Step], ignored: set[str], *options: str, seconds: float = _SLURM_SECONDS
    ) -> list[str]:
        """Cancel or signal steps, but those with ignored ids; return the ids of those for which Slurm has done it."""
        names = {step.command.step for step in steps}
        # Slurm keeps a step that had a lost node until the job ends, and the worker's next step has the same name
        listed = {number: name for number, name in (self.running(seconds) or {}).items() if name in names}
        ids = [number for number in listed if number not in ignored]
        done = ids if self.cancel_ids(ids, *options, seconds=seconds) else []
        living = {name for number, name in listed.items() if number not in self._cancelled}
        for step in steps:
            if step.command.step not in living:
                # not created yet, or Slurm doesn't answer: only its srun can end it, though not in order
                step.child.send(signal.SIGTERM)
        return done

    def cancel_ids(self, ids: Sequence[str], *options: str, seconds: float = _SLURM_SECONDS) -> bool:
        """Cancel steps by their ids, or with ``--signal=…`` signal them; return whether Slurm has done it."""
        if not ids:
            return True
        is_signal = any(option.startswith("--signal") for option in options)
        return _ask_slurm("scancel", *options, *ids, seconds=_SIGNAL_SECONDS if is_signal else seconds) is not None

    def running(self, seconds: float = _SLURM_SECONDS) -> dict[str, str] | None:
        """Return the names of the job's steps by their ids, ``JOB.STEP``; None if Slurm doesn't answer."""
        words = ("squeue", "--steps", f"--jobs={self._job_id}", "--noheader", "--format=%i|%j")
        text = _ask_slurm(*words, seconds=seconds)
        if text is None:
            return None
        return {step: name for step, _, name in (line.partition("|") for line in text.splitlines())}

    def nodes_of(self, step: str) -> tuple[str, ...]:
        """Return the nodes of one of the job's steps, ``JOB.STEP``; empty if Slurm doesn't say."""
        text = _ask_slurm("squeue", f"--steps={step}", "--noheader", "--format=%N")
        return tuple(expand(text.strip(), "squeue")) if text and text.strip() else ()


def is_step_name(name: str) -> bool:
    """Return whether a step's name is one that `launch` gives."""
    return name.startswith(STEP_PREFIX)


def end_of_job(job_id: str) -> str:
    """Return when the job's time ends according to Slurm, in seconds since 1970; empty if it isn't known."""
    environ = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    text = _ask_slurm("squeue", f"--jobs={job_id}", "--noheader", "--format=%e", environ=environ) or ""
    return text.strip() if text.strip().isdecimal() else ""


class MpirunStepController:
    """Ends steps that run under mpirun, or directly on this host."""

    def signal(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.ready_file is None:
                step.child.send(signal.SIGTERM)
            elif not _signal_rank_zero(step.ready_file):
                # mpirun then kills its ranks at once: it forwards no signal that makes them drain
                step.child.send(signal.SIGTERM)

    def why_not_drained(self, step: Step) -> str:
        host = "" if step.ready_file is None else _read_ready(step.ready_file).get("host", "")
        if not host or host == os.uname().nodename:  # one that isn't ready yet has nothing in flight
            return ""
        return f"its rank 0 runs on {host}, and mpirun forwards no signal that lets it drain"

    def cancel(self, steps: Sequence[Step]) -> None:
        for step in steps:
            step.child.send(signal.SIGTERM)


def _ask_slurm(*words: str, environ: Mapping[str, str] | None = None, seconds: float = _SLURM_SECONDS) -> str | None:
    """Run one of Slurm's commands; return its output, or None if it fails. A failure must not stop the end of other steps."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return ""  # the job ended some time ago
    return done.stdout if done.returncode == 0 else None


def _signal_rank_zero(ready_file: Path) -> bool:
    """Let rank 0 drain, if it runs on this host; return whether it does."""
    content = _read_ready(ready_file)
    try:
        pid, host = content["pid"], content["host"]
        start = ProcessStart(content["started"], content.get("process_start"))
    except (KeyError, TypeError, AttributeError):
        return False
    is_read = isinstance(pid, int) and isinstance(start.time, float) and host == os.uname().nodename
    return is_read and signal_worker(pid, start, signal.SIGTERM)


def _read_ready(ready_file: Path) -> dict[str, Any]:
    """Return a ready file's content; empty if there is none."""
    try:
        content = json.loads(read_own(ready_file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
