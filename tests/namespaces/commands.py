# SPDX-License-Identifier: Apache-2.0
"""Commands inside the cluster, as their starter outside sees them: signals, time limits, environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from .processes import children_of

OTHER_LAUNCHERS = ("SLURM", "SALLOC_", "SBATCH_", "SRUN_", "PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL")
"""Prefixes of variables that a job or an mpirun around the tests would smuggle in."""


class InsideProcess(subprocess.Popen[str]):
    """A process inside the cluster: signals reach the command itself, not the ``nsenter`` that stands before it."""

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command; ``terminate`` and ``kill`` come here too."""
        if self.poll() is None:
            for pid in children_of(self.pid) or [self.pid]:
                os.kill(pid, sig)

    def end(self, grace_seconds: float = 5.0) -> tuple[str, str]:
        """End it by SIGTERM, on which srun ends its step too, or by SIGKILL after ``grace_seconds`` seconds.

        Returns:
            the rest of its stdout and stderr.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send_signal(number)
            try:
                return self.communicate(timeout=grace_seconds)
            except subprocess.TimeoutExpired:
                continue
        return "", "(what it started still holds its pipes)"

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.end()  # or else Popen waits, and a failed test hangs instead of failing
        super().__exit__(kind, value, traceback)


def run_to_end(process: InsideProcess, timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for a process and its output.

    Raises:
        subprocess.TimeoutExpired: it did not end within ``timeout`` seconds, and was ended; with all of its output.
    """
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            stdout, stderr = process.end()
            raise subprocess.TimeoutExpired(process.args, timeout, stdout, stderr) from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def default_environment(temporary: Path) -> dict[str, str]:
    """This process's environment, without any launcher's, with this Python's folder first on PATH.

    Args:
        temporary: becomes TMPDIR.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHER_LAUNCHERS)}
    path = [str(Path(sys.executable).parent), *os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin"]
    return {**kept, "PATH": os.pathsep.join(dict.fromkeys(path)), "TMPDIR": str(temporary)}
