# SPDX-License-Identifier: Apache-2.0
"""A child process that ends with the thread that started it, and its session of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dynamo_mpi.common.exit_codes import of_signal
from dynamo_mpi.common.log_tail import last_lines, last_text
from dynamo_mpi.common.pdeathsig_command import with_pdeathsig
from dynamo_mpi.common.process import is_stopped

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dynamo_mpi.common.signals import Interrupts

# a process ends in no time, unless it hangs in the kernel
KILL_SECONDS, POLL_SECONDS, _LOOK_SECONDS = 5.0, 0.05, 0.005


class ManagedProcess:
    """A running child, leader of a session of its own.

    The session keeps the terminal's Ctrl-C and SIGHUP away from it, and names all its descendants. Start it from the main thread, or from one
    that lives as long as the child may: the kernel ends the child when the *thread* that started it ends.

    Args:
        name: in messages.
        command: its command line.
        environment: all of its environment.
        stdin, stdout, stderr: as `subprocess.Popen` takes them.
        end_with: what it gets if we end without having ended it: a launcher needs a signal that lets it end its ranks.

    Raises:
        OSError: no process can be started, for lack of memory or of process ids.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        end_with: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.popen = subprocess.Popen(
            with_pdeathsig(command, parent=os.getpid(), end_with=end_with),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=dict(environment),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def exit_code(self) -> int | None:
        """Return None while it runs, then its exit code as a shell would give it."""
        code = self.popen.poll()
        return code if code is None or code >= 0 else of_signal(-code)

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, but no longer than ``seconds``; return whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.exit_code() is not None

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself, not its descendants. A stopped one is resumed, to take the signal."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        self.resume()

    def resume(self) -> None:
        """Resume it if it is stopped: it would take no signal but SIGKILL, and not see the end of its own children."""
        if self.exit_code() is None and is_stopped(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    def members(self) -> list[int]:
        """Return the living processes of its session."""
        return session_members(self.pid)

    def kill_group(self) -> None:
        """Kill it and its process group, without waiting for their end."""
        if self.popen.returncode is None:  # until its end is collected, its number is nobody else's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def kill(self, seconds: float = KILL_SECONDS) -> bool:
        """Kill it and all of its session, also in process groups of their own, as Open MPI's ranks are.

        Args:
            seconds: to wait until they are gone; what hangs in the kernel, in a GPU driver say, may not go in that time.

        Returns:
            Whether they are gone.
        """
        self.kill_group()
        end = time.monotonic() + seconds
        # more than once: one may just be starting another
        while left := [pid for pid in self.members() if pid != self.pid]:
            _kill_each(left)
            if time.monotonic() >= end:
                break
            time.sleep(_LOOK_SECONDS)
        return self.wait(max(0.0, end - time.monotonic())) and not left


class LoggedProcess(ManagedProcess):
    """A running child whose output goes to a file.

    Args:
        name: in messages.
        command: its command line.
        environment: all of its environment.
        log: where its output is appended.
        end_with: as for `ManagedProcess`.

    Raises:
        OSError: the log can't be written, or no process can be started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        end_with: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._log_start = output.tell()
            super().__init__(
                name, command, environment=environment, stdout=output, stderr=subprocess.STDOUT, end_with=end_with
            )

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of its output; not those that others wrote to the log before it."""
        return last_lines(self.log, count, self._log_start)

    def output(self) -> str:
        """Return its output, the end of a long one; not what others wrote to the log before it."""
        return last_text(self.log, self._log_start)


def await_exit(
    processes: Collection[ManagedProcess],
    seconds: float,
    interrupts: Interrupts,
    signals_before: int | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Wait until processes have ended, but no longer than ``seconds``, nor past a further signal. Those that are stopped are resumed.

    Args:
        processes: all of them.
        seconds: to wait.
        interrupts: takes note of signals.
        signals_before: how many signals had come when the end began; None where a further one changes nothing.
        poll_seconds: between two looks.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.exit_code() is None for process in processes):
        if signals_before is not None and interrupts.count != signals_before:
            return
        for process in processes:
            process.resume()
        interrupts.sleep(poll_seconds)


def stop(processes: Collection[ManagedProcess], seconds: float, interrupts: Interrupts, signals_before: int) -> None:
    """Ask processes to end by SIGTERM, all at once; then kill what is left of them.

    Args:
        processes: all of them.
        seconds: for them to end in.
        interrupts: takes note of signals.
        signals_before: as for `await_exit`.
    """
    for process in processes:
        process.send(signal.SIGTERM)
    await_exit(processes, seconds, interrupts, signals_before)
    for process in processes:
        process.kill()


def session_members(session: int) -> list[int]:
    """Return the ids of the processes of a session that aren't zombies."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # ended meanwhile
        # The command's name is in parentheses and may hold anything; state, parent, group, session follow (proc(5)).
        state, _, _, owner = text.rpartition(")")[2].split()[:4]
        if int(owner) == session and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def kill_session(session: int) -> None:
    """Kill what is left of a session, also in process groups of its own, as Open MPI's ranks are."""
    _kill_each(session_members(session))


def _kill_each(pids: Collection[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
