# SPDX-License-Identifier: Apache-2.0
"""A child process that ends with the thread that started it, and its session of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.credentials import DESCRIPTORS, SERVICES_FILE, memory_file
from dynamo_mpi.common.errors import of_signal
from dynamo_mpi.common.log_tail import last_lines, last_text
from dynamo_mpi.common.own_files import open_own
from dynamo_mpi.common.process import is_stopped

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dynamo_mpi.common.signals import Interrupts

_PDEATHSIG = Path(__file__).with_name("pdeathsig.py")


def with_pdeathsig(
    command: Sequence[str],
    *,
    parent: int | None = None,
    rank_logs: Path | None = None,
    end_with: signal.Signals = signal.SIGKILL,
) -> tuple[str, ...]:
    """Return the command line that runs ``command`` so that it is killed when its parent exits.

    Args:
        command: the command.
        parent: the parent's process id, if it is known in advance; avoids a race at the start.
        rank_logs: directory for one log per MPI rank.
        end_with: the signal that it gets then.
    """
    words = [sys.executable, "-I", "-S", str(_PDEATHSIG)]
    if parent is not None:
        words += ["--parent", str(parent)]
    if end_with is not signal.SIGKILL:
        words += ["--signal", str(int(end_with))]
    if rank_logs is not None:
        words += ["--rank-logs", str(rank_logs)]
    return (*words, "--", *command)


# a killed process exits at once unless it hangs in the kernel
KILL_SECONDS, POLL_SECONDS, _LOOK_SECONDS = 5.0, 0.05, 0.005


class Streams(NamedTuple):
    """The standard streams of a child, as in `subprocess.Popen`, and further descriptors that it inherits, under the same numbers."""

    stdin: int | IO[bytes] = subprocess.DEVNULL
    stdout: int | IO[bytes] | None = None
    stderr: int | IO[bytes] | None = None
    inherited: tuple[int, ...] = ()


_NO_STREAMS = Streams()


class ManagedProcess:
    """A running child, leader of a session of its own.

    The session protects it from the terminal's SIGINT and SIGHUP, and identifies all its descendants. Start it from the main thread, or from
    one that outlives the child: the kernel kills the child when the *thread* that started it ends.

    Args:
        name: its name in messages.
        command: its command line.
        environment: its whole environment.
        streams: its standard streams.
        end_with: the signal that it gets if this process exits without having ended it: a launcher needs one that lets it end its ranks.
        services: variables with addresses and credentials, which it reads as a services file in memory; none for no file.

    Raises:
        OSError: no process can be started, for lack of memory or of process ids.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        streams: Streams = _NO_STREAMS,
        end_with: signal.Signals = signal.SIGKILL,
        services: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        variables, files = dict(environment), tuple[int, ...]()
        if services:
            files = (memory_file(services),)
            variables[SERVICES_FILE] = f"{DESCRIPTORS}{files[0]}"
        try:
            self.popen = subprocess.Popen(
                with_pdeathsig(command, parent=os.getpid(), end_with=end_with),
                stdin=streams.stdin,
                stdout=streams.stdout,
                stderr=streams.stderr,
                env=variables,
                pass_fds=(*files, *streams.inherited),
                start_new_session=True,
            )
        finally:
            for each in files:
                os.close(each)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def exit_code(self) -> int | None:
        """Return the exit code as in a shell; None while the process runs."""
        code = self.popen.poll()
        return code if code is None or code >= 0 else of_signal(-code)

    def wait(self, seconds: float) -> bool:
        """Wait until the process has exited, at most ``seconds``; return whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.exit_code() is not None

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, not its descendants. A stopped process is resumed, so that it handles the signal."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        self.resume()

    def resume(self) -> None:
        """Resume the process if it is stopped: otherwise it would handle no signal but SIGKILL, nor its children's exits."""
        if self.exit_code() is None and is_stopped(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    def members(self) -> list[int]:
        """Return the running processes of its session."""
        return session_members(self.pid)

    def kill_group(self) -> None:
        """Kill the process and its process group, without waiting."""
        if self.popen.returncode is None:  # until it is reaped, its pid is not reused
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def kill(self, seconds: float = KILL_SECONDS) -> bool:
        """Kill the process and its whole session, including other process groups, such as those of Open MPI's ranks.

        Args:
            seconds: time to wait until they have exited; a process that hangs in the kernel, for instance in a GPU driver, may take longer.

        Returns:
            Whether they have exited.
        """
        self.kill_group()
        end = time.monotonic() + seconds
        # repeatedly, because a process may just be starting another
        while left := [pid for pid in self.members() if pid != self.pid]:
            _kill_each(left)
            if time.monotonic() >= end:
                break
            time.sleep(_LOOK_SECONDS)
        return self.wait(max(0.0, end - time.monotonic())) and not left


class LoggedProcess(ManagedProcess):
    """A running child whose output goes to a file.

    Args:
        name: its name in messages.
        command: its command line.
        environment: its whole environment.
        log: the file to which its output is appended.
        end_with: as in `ManagedProcess`.

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
        with open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output:
            self._log_start = output.tell()
            streams = Streams(stdout=output, stderr=subprocess.STDOUT)
            super().__init__(name, command, environment=environment, streams=streams, end_with=end_with)

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of its output, without older lines of the log."""
        return last_lines(self.log, count, self._log_start)

    def output(self) -> str:
        """Return its output, or the end of a long one, without older lines of the log."""
        return last_text(self.log, self._log_start)


def await_exit(
    processes: Collection[ManagedProcess],
    seconds: float,
    interrupts: Interrupts,
    signals_before: int | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Wait until processes have exited, at most ``seconds`` or until a further signal. Stopped processes are resumed.

    Args:
        processes: the processes.
        seconds: the longest time to wait.
        interrupts: records signals.
        signals_before: number of signals when the shutdown began; None if further signals are ignored.
        poll_seconds: interval of polling.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.exit_code() is None for process in processes):
        if signals_before is not None and interrupts.count != signals_before:
            return
        for process in processes:
            process.resume()
        interrupts.sleep(poll_seconds)


def stop(processes: Collection[ManagedProcess], seconds: float, interrupts: Interrupts, signals_before: int) -> None:
    """Send processes SIGTERM, all at once; then kill those that are left.

    Args:
        processes: the processes.
        seconds: the time that they have to exit.
        interrupts: records signals.
        signals_before: as in `await_exit`.
    """
    for process in processes:
        process.send(signal.SIGTERM)
    await_exit(processes, seconds, interrupts, signals_before)
    for process in processes:
        process.kill()


def session_members(session: int) -> list[int]:
    """Return the ids of a session's processes that aren't zombies."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # exited meanwhile
        # the name is in parentheses and may contain any character; state, parent, group, session follow (proc(5))
        state, _, _, owner = text.rpartition(")")[2].split()[:4]
        if int(owner) == session and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def kill_session(session: int) -> None:
    """Kill the remaining processes of a session, including other process groups, such as those of Open MPI's ranks."""
    _kill_each(session_members(session))


def _kill_each(pids: Collection[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
