# SPDX-License-Identifier: Apache-2.0
"""Other programs as witnesses: each has a deadline, and none outlives us."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.subprocess import ManagedProcess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PACKAGE_HOME = str(Path(__file__).resolve().parents[3])
_LONGEST_TEXT = 200
_KILL_SECONDS = 1.0
_running: set[ManagedProcess] = set()
_lock = threading.Lock()


class Output(NamedTuple):
    """What a program said.

    Args:
        code: its exit code, negative for the signal that ended it; None where it was ended as it took too long.
        out: its stdout.
        err: its stderr.
        seconds: what it had.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Both, as versions of Slurm differ in what goes where."""
        return self.out + self.err

    @property
    def trouble(self) -> str:
        """Why it is no witness; empty where it ended well."""
        if self.code is None:
            return f"it did not end within {self.seconds:.1f} s"
        if self.code == 0:
            return ""
        ending = f"ended by {_signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"
        said = " ".join((self.err.strip() or self.out.strip()).split())[-_LONGEST_TEXT:]
        return f"{ending}: {said}" if said else ending


def find(program: str, environ: Mapping[str, str]) -> str | None:
    """Return a program's path as ``environ`` has it, or None."""
    return shutil.which(program, path=environ.get("PATH", os.defpath))


def run(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Output:
    """Run a program, and end it and its descendants when the time is up.

    Call it from a thread that lives as long as the program may: the program is ended with it.
    """
    process = ManagedProcess(command[0], command, environment=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with _lock:
        _running.add(process)
    try:
        out, err = (text.decode(errors="replace") for text in process.popen.communicate(timeout=seconds))
        return Output(process.popen.returncode, out, err, seconds)
    except subprocess.TimeoutExpired:
        return Output(None, "", "", seconds)
    finally:
        # also where it has ended itself: one that it started may hold on to our pipes; one that hangs in a driver goes when that lets it
        process.kill(_KILL_SECONDS)
        for pipe in (process.popen.stdout, process.popen.stderr):
            if pipe is not None:
                pipe.close()
        with _lock:
            _running.discard(process)


def run_module(module: str, environ: Mapping[str, str], seconds: float) -> Output:
    """Run one of our modules in a Python of its own, where it may crash or hang."""
    path = os.pathsep.join(filter(None, (_PACKAGE_HOME, environ.get("PYTHONPATH", ""))))
    return run([sys.executable, "-m", module], {**environ, "PYTHONPATH": path}, seconds)


def end_all() -> None:
    """End what still runs."""
    with _lock:
        left = tuple(_running)
    for process in left:
        process.kill_group()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
