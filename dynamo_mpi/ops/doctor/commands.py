# SPDX-License-Identifier: Apache-2.0
"""Runs other programs for doctor: each with a time limit, and none outlives doctor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.subprocess import ManagedProcess, Streams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PACKAGE_HOME = str(Path(__file__).resolve().parents[3])
_LONGEST_TEXT = 200
_KILL_SECONDS = 1.0
_running: set[ManagedProcess] = set()
_lock = threading.Lock()


class Output(NamedTuple):
    """A program's output.

    Args:
        code: its exit code, negative for the signal that ended it; None if it was ended at the time limit.
        out: its stdout.
        err: its stderr.
        seconds: the time limit.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Both outputs, because versions of Slurm differ in which one they use."""
        return self.out + self.err

    @property
    def problem(self) -> str:
        """The problem; empty if the program succeeded."""
        if self.code is None:
            return f"it did not end within {self.seconds:.1f} s"
        if self.code == 0:
            return ""
        ending = f"ended by {_signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"
        said = " ".join((self.err.strip() or self.out.strip()).split())[-_LONGEST_TEXT:]
        return f"{ending}: {said}" if said else ending


def find(program: str, environ: Mapping[str, str]) -> str | None:
    """Return a program's path on ``environ``'s PATH, or None."""
    return shutil.which(program, path=environ.get("PATH", os.defpath))


def run(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Output:
    """Run a program, and end it and its descendants at the time limit.

    Call it from a thread that runs longer than the program: the program ends with the thread.
    """
    process = ManagedProcess(
        command[0], command, environment=environ, streams=Streams(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    )
    with _lock:
        _running.add(process)
    try:
        out, err = (text.decode(errors="replace") for text in process.popen.communicate(timeout=seconds))
        return Output(process.popen.returncode, out, err, seconds)
    except subprocess.TimeoutExpired:
        return Output(None, "", "", seconds)
    finally:
        # also if it has ended: its children may hold our pipes; a process that hangs in a driver ends when the driver returns
        process.kill(_KILL_SECONDS)
        for pipe in (process.popen.stdout, process.popen.stderr):
            if pipe is not None:
                pipe.close()
        with _lock:
            _running.discard(process)


def run_module(module: str, environ: Mapping[str, str], seconds: float) -> Output:
    """Run one of our modules in a separate Python, in which it may crash or hang."""
    path = os.pathsep.join(filter(None, (_PACKAGE_HOME, environ.get("PYTHONPATH", ""))))
    return run([sys.executable, "-m", module], {**environ, "PYTHONPATH": path}, seconds)


def end_all() -> None:
    """End all programs that still run."""
    with _lock:
        left = tuple(_running)
    for process in left:
        process.kill_group()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
