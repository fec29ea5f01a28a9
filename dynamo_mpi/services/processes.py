# SPDX-License-Identifier: Apache-2.0
"""A child process that can't outlive us, and the session of processes it may have started in turn."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_mpi.common.process import is_stopped
from dynamo_mpi.exit_codes import of_signal
from dynamo_mpi.services.logs import last_lines, last_text
from dynamo_mpi.supervision.tethered import tethered

# a process ends in no time, unless it hangs in the kernel
KILL_SECONDS, _LOOK_SECONDS = 5.0, 0.005


@dataclass(frozen=True)
class Child:
    """One part of the stack as a running process, leader of a session of its own.

    The session keeps the terminal's Ctrl-C and SIGHUP away from it, and names all its descendants.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int = 0

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        end_with: signal.Signals = signal.SIGKILL,
    ) -> Child:
        """Start a part. Call it from the main thread: the tether reacts to the end of the starting *thread*.

        Args:
            name: of the part.
            command: its command line.
            environment: the whole of it.
            log: where its output goes.
            end_with: what it gets when we end without having ended it: a launcher needs one that lets it end its ranks.
        """
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                tethered(command, parent=os.getpid(), end_with=end_with),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(name, process, log, log_start)

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """Return None while it runs, then its exit code as a shell would give it."""
        code = self.process.poll()
        return code if code is None or code >= 0 else of_signal(-code)

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself, not its descendants. One that is stopped goes on, to take it."""
        self.process.send_signal(number)
        self.resume()

    def members(self) -> list[int]:
        """Return the living processes of its session."""
        return session_members(self.pid)

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of its log; not those of whoever wrote there before it."""
        return last_lines(self.log, count, self.log_start)

    def words(self) -> str:
        """Return what it has written to its log, of a long one the end; not what others wrote there before it."""
        return last_text(self.log, self.log_start)

    def resume(self) -> None:
        """Have it go on if it is stopped: it would take no signal but SIGKILL, and not see the end of its own children."""
        if self.process.poll() is None and is_stopped(self.pid):
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it and all of its session, now, and wait until they have gone."""
        self.process.kill()
        end = time.monotonic() + KILL_SECONDS
        # more than once: one may just be starting another
        while (left := [pid for pid in self.members() if pid != self.pid]) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
        self.process.wait()


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
    for pid in session_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
