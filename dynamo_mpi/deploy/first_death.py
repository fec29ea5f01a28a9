# SPDX-License-Identifier: Apache-2.0
"""Finds the rank that ended first in a launcher's output. Pure.

The patterns are for the output of srun (Slurm 22.05), Open MPI's mpirun (4 and 5) and MPICH's mpiexec, recorded in
``tests/data/launchers``. Errors of ranks ("MPI_ABORT was invoked on rank 0", "An error occurred in Socket closed") follow from the first
failure, and name a rank that survived it.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SIGNALS = {signal.strsignal(number): int(number) for number in signal.valid_signals()}
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
# srun --label puts this before output of ranks and slurmstepd; srun's own lines have none
_LABEL = re.compile(r"^ *\d+: ?", re.MULTILINE)
_TASKS = re.compile(r"^srun: error: (\S+): tasks? ([\d,\[\]-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
_LEFT = re.compile(
    r"^slurmstepd\S*: error: +mpi/pmix\w*: _errhandler: (\S+) .* source = \[slurm\.pmix\.[\d.]+:(\d+)\]", re.MULTILINE
)
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_EXECVE = re.compile(r"^slurmstepd(?:-(\S+))?: error: execve\(\): (.+)$", re.MULTILINE)
_UNLAUNCHED = re.compile(r"^srun: error: Task launch for \S+ failed on node (\S+): (.+)$", re.MULTILINE)
_CANCELLED = re.compile(r"\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT \S+ (DUE TO [A-Z ]+)")
# after this line, srun reports tasks that it has ended itself
_ABORTED = re.compile(
    r"^srun: (?:Job step aborted|launch/slurm: _step_signal: Terminating)|\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED",
    re.MULTILINE,
)
# Open MPI breaks lines anywhere; these patterns match text with single blanks
_NOTICED = re.compile(r"noticed that process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
_STATUS = re.compile(r"The first process to do so was: Process name: \[\S+?,(\d+)\] Exit code: (\d+)")
_IMPROPERLY = re.compile(r"has exited due to process rank (\d+) with PID \d+ on node (\S+) exiting improperly")
_DAEMON = re.compile(r"has lost communication with a remote daemon\..*? Remote daemon: \S+ on node (\S+)")
_UNSPAWNED = re.compile(r"A daemon failed to report back after being spawned\..*? Remote host: (\S+)")
# sometimes this is all that Open MPI 4 prints
_PRIMARY = re.compile(r"Primary job terminated normally, but \d+ process(?:es)? returned a non-zero exit code")
_PEER = re.compile(r"MPI communication peer process has unexpectedly disconnected\..*? Peer host: (\S+)")
_BAD = re.compile(r"= PID (\d+) RUNNING AT (\S+) = EXIT CODE: (\d+)(?:.*?EXIT STRING: .*?\(signal (\d+)\))?")
# errors of ranks whose peer is lost; an exit code after one of them is of such a rank
_COMPLAINT = re.compile(
    r"MPI_ABORT was invoked|An error occurred in Socket closed|peer process has unexpectedly disconnected"
)
_STRING = re.compile(r"YOUR APPLICATION TERMINATED WITH THE EXIT STRING: .*?\(signal (\d+)\)")


class Death(NamedTuple):
    """How the first rank ended, according to the launcher.

    Args:
        ranks: the rank; several if the launcher names them together; empty if it names none.
        host: its node; empty if it isn't known.
        signal: the signal that killed it; 0 for none.
        code: its exit code; None if it isn't known.
        how: a description, if it is neither a signal nor a code.
        pid: its process, if the launcher names that and no rank; 0 for none.
        is_sure: False if the launcher had started to end the ranks before it named this one.
    """

    ranks: tuple[int, ...] = ()
    host: str = ""
    signal: int = 0
    code: int | None = None
    how: str = ""
    pid: int = 0
    is_sure: bool = True

    def placed(self, nodes: Sequence[str], ranks_per_node: int) -> Death:
        """Add the host or the ranks that follow from the placement: consecutive blocks of ``ranks_per_node`` on each of these nodes."""
        if len(self.ranks) == 1 and not self.host and self.ranks[0] // ranks_per_node < len(nodes):
            return self._replace(host=nodes[self.ranks[0] // ranks_per_node])
        if not self.ranks and ranks_per_node == 1 and self.host in nodes:
            return self._replace(ranks=(nodes.index(self.host),))
        return self

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        if not self.ranks:
            who = f"a rank{where}" + (f" (process {self.pid})" if self.pid else "")
        elif len(self.ranks) == 1:
            who = f"rank {self.ranks[0]}{where}"
        else:
            who = f"one of ranks {', '.join(map(str, self.ranks))}{where}"
        return f"{who} {self._what}{'' if self.is_sure else ', according to its launcher, which was already ending the ranks'}"

    @property
    def _what(self) -> str:
        if self.how:
            return self.how
        if self.signal:
            return f"was killed by {spell_signal(self.signal)}"
        if self.code is not None:
            if self.code > 128 and _is_named(self.code - 128):
                return f"left with exit code {self.code}, as after {spell_signal(self.code - 128)}"
            return f"left with exit code {self.code}"
        return "died"


def first_death(text: str) -> Death | None:
    """Return the first rank's end according to the launcher; None if its output has none.

    Args:
        text: the output of a step: the launcher's and the ranks'.
    """
    words = _joined(text)
    # mpirun's daemons may be srun's tasks, so mpirun's own output has priority
    found = sorted(_of_mpirun(words), key=_place) or sorted(_of_srun(text), key=_place)
    if found:
        death = found[0][1]
        if not death.is_sure:
            # no launcher ends a rank by such a signal
            death = next((each for _, each in found if each.signal in _CRASHES), death)
        return death._replace(is_sure=False) if death.code is not None and _COMPLAINT.search(words) else death
    if peer := _PEER.search(words):
        return Death(host=peer[1], how="closed its connections, which ended its peers")
    return Death(how="ended with a code other than 0; mpirun reports nothing else") if _PRIMARY.search(words) else None


def ended_task(text: str) -> Death | None:
    """Return the first task that srun itself reports as failed while the step may still run; None if there is none.

    Args:
        text: the output of a step that runs with ``--label``: no rank's line can look like srun's own.
    """
    found = _TASKS.search(text)
    return None if found is None else next(_of_srun(found[0]))[1]


def _place(found: tuple[int, Death]) -> int:
    return found[0]


def _of_srun(text: str) -> Iterator[tuple[int, Death]]:
    text = _LABEL.sub("", text)
    aborted = found.start() if (found := _ABORTED.search(text)) else len(text)
    for each in _TASKS.finditer(text):
        hosts, tasks, how = each.groups()
        host = hosts if "[" not in hosts and "," not in hosts else ""
        yield each.start(), _task(_numbers(tasks), host, how)._replace(is_sure=each.start() < aborted)
    for each in _LEFT.finditer(text):
        yield (
            each.start(),
            Death((int(each[2]),), each[1], how="exited without MPI_Finalize", is_sure=each.start() < aborted),
        )
    for each in _NODE.finditer(text):
        yield each.start(), Death(host=each[1], how="was lost with its node, according to Slurm")
    for each in _EXECVE.finditer(text):
        yield each.start(), Death(host=each[1] or "", how=f"could not be started: {each[2]}")
    for each in _UNLAUNCHED.finditer(text):
        yield each.start(), Death(host=each[1], how=f"could not be started by its node's slurmd: {each[2]}")
    for each in _CANCELLED.finditer(text):
        yield each.start(), Death(how=f"was ended with its step by Slurm, {each[1].strip().lower()}")


def _of_mpirun(words: str) -> Iterator[tuple[int, Death]]:
    for each in _NOTICED.finditer(words):
        yield each.start(), Death((int(each[1]),), each[2], signal=int(each[3]))
    for each in _STATUS.finditer(words):
        yield each.start(), Death((int(each[1]),), code=int(each[2]))
    for each in _IMPROPERLY.finditer(words):
        yield each.start(), Death((int(each[1]),), each[2], how="left without MPI's end")
    for each in _DAEMON.finditer(words):
        yield each.start(), Death(host=each[1], how="was lost with its host, whose daemon mpirun can no longer reach")
    for each in _UNSPAWNED.finditer(words):
        yield each.start(), Death(host=each[1], how="ended with its host's daemon, or that did not start")
    for each in _BAD.finditer(words):
        yield each.start(), _of_mpich(int(each[1]), each[2], int(each[3]), int(each[4] or 0))
    if not _BAD.search(words) and (string := _STRING.search(words)):
        yield string.start(), _of_mpich(0, "", 0, int(string[1]))


def _of_mpich(pid: int, host: str, code: int, number: int) -> Death:
    """MPICH names no rank, its exit code may be another rank's, and it may report a rank that it has killed itself."""
    number = number or (code if 0 < code < 64 and _is_named(code) else 0)
    return Death(host=host, signal=number, code=None if number else code, pid=pid, is_sure=number != signal.SIGKILL)


def _task(ranks: tuple[int, ...], host: str, how: str) -> Death:
    if how in _SIGNALS:
        return Death(ranks, host, signal=_SIGNALS[how])
    if code := re.fullmatch(r"Exited with exit code (\d+)", how):
        return Death(ranks, host, code=int(code[1]))
    return Death(ranks, host, how="ran out of memory" if how == "Out Of Memory" else f"ended: {how}")


def _numbers(text: str) -> tuple[int, ...]:
    """Read ``0-2,5``."""
    numbers: list[int] = []
    for part in text.strip("[]").split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _joined(text: str) -> str:
    return " ".join(text.split())


def spell_signal(number: int) -> str:
    """Return a signal's number and name."""
    return f"signal {number}" + (f" ({signal.Signals(number).name})" if _is_named(number) else "")


def _is_named(number: int) -> bool:
    return number in signal.valid_signals() and number < signal.SIGRTMIN
