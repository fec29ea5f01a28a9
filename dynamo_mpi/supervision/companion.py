# SPDX-License-Identifier: Apache-2.0
"""The companion of a node's ranks: a process beside them, forked before ``MPI_Init``, that is no rank.

Until the verdict it watches the ranks of its node, which nobody else does: one that dies, is stopped or never comes would leave the others
in MPI's start for ever. From then on liveness does that (`lookout`). Rank 0's companion goes on watching rank 0, and stays as its heir
(`heir`): when rank 0 is killed or stuck, it takes the worker out of discovery. The companion of one other node is heir too, for
the case that rank 0's node is lost.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING

from dynamo_mpi.errors import BootstrapError, DeadlineError
from dynamo_mpi.observe.speech import speech
from dynamo_mpi.supervision.companion_address import peer_is_ours
from dynamo_mpi.supervision.companion_limits import Limits
from dynamo_mpi.supervision.companion_report import Local, describe_late
from dynamo_mpi.supervision.failure import Cause, Failure
from dynamo_mpi.supervision.failure_files import write_failure
from dynamo_mpi.supervision.heir import MOURN, Heir, mourned
from dynamo_mpi.supervision.meeting import Meeting
from dynamo_mpi.supervision.title import set_title
from dynamo_mpi.supervision.troubles import death, silence
from dynamo_mpi.supervision.word import begun, suppressed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.launchers.launch import Launch

_TICK_SECONDS = 0.25
_STALL_SECONDS = 0.5
# mpirun ends the others 0.25 s after it has seen a rank die, Slurm after 0.3: what has gone until then was no consequence
_SETTLE_SECONDS = 0.12
# what came in one round; a launcher that ends the others because one has gone takes longer
_SAME_SECONDS = 0.003
_STACKS_SECONDS = 1.0
_END_SECONDS = 4.0
_STUCK_SECONDS = 1.0
_REPORT_SECONDS = 2.0


class Companion:
    """Watches; all of it runs in one thread, but for its reports.

    Args:
        listener: where the other ranks of this node connect; None for a rank that is alone.
        first: a connection to the rank that forked it.
        launch: how that rank was started.
        host: this node.
        limits: see there.
    """

    def __init__(
        self, listener: socket.socket | None, first: socket.socket, launch: Launch, host: str, limits: Limits
    ) -> None:
        self._launch, self._host, self._limits = launch, host, limits
        self._meeting = Meeting(host, heartbeat_timeout=limits.heartbeat_timeout, failure_dir=limits.failure_dir)
        self._selector = selectors.DefaultSelector()
        self._ranks: list[Local] = []
        self._gone: list[Local] = []
        self._heir = Heir()
        self._began = time.monotonic()
        self._decide_at = self._kill_at = self._stop_at = self._told_at = math.inf
        self._admit(first)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def run(self) -> None:
        """Watch until all ranks of this node have left, or are ended."""
        due = time.monotonic() + _TICK_SECONDS
        while not self._is_over():
            now = time.monotonic()
            for key, _ in self._selector.select(max(0.0, min(due, self._decide_at) - now)):
                key.data()
            now = time.monotonic()
            if now >= self._decide_at:
                self._decide_at = math.inf
                self._decide()
            if now >= due:
                self._forgive(now - due)
                self._look(now)
                due = time.monotonic() + _TICK_SECONDS
        self._heir.close()

    def _is_over(self) -> bool:
        return time.monotonic() > self._stop_at or not (self._ranks or self._decide_at < math.inf)

    def _forgive(self, late: float) -> None:
        """Where it was this process that stood still, that is not held against the ranks."""
        if late > _STALL_SECONDS:
            self._began += late
            for local in self._ranks:
                local.heard += late
                local.asked += late

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if peer_is_ours(connection):
            self._admit(connection)
        else:
            connection.close()

    def _admit(self, connection: socket.socket) -> None:
        local = Local(connection)
        self._ranks.append(local)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(local))

    def _read(self, local: Local) -> None:
        lines = local.read()
        for line in lines or ():
            self._take(local, line)
        if lines is None:
            self._forget(local)

    def _take(self, local: Local, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "rank" and rest.isdecimal():
            local.rank = int(rest)
        elif word == "phase":
            local.phase = rest
        elif word == "stacks":
            local.stacks = rest.replace("\v", "\n")
        elif word == "label":
            self._meeting = self._meeting._replace(label=rest)
        elif word == "judged":
            local.judged = True
        elif word == "leave":
            local.left = True
        elif word == "told":
            local.told = True
            self._told_at = min(self._told_at, time.monotonic())
        elif word == "failed" and rest.isdecimal():
            local.told = True
            self._order_end(int(rest))
        elif word == "heir":
            local.leaves_to_us = True
            self._heir.inherit(rest)
        elif word == MOURN:
            self._heir.act()
            if (told := mourned(rest)) is not None:
                # what rank 0's own companion has to say counts more, where it comes first
                self._heir.leave_word(*told, f"error in {told[0].phase}: {told[0].text}")

    def _forget(self, local: Local) -> None:
        self._selector.unregister(local.connection)
        local.connection.close()
        self._ranks.remove(local)
        local.heard = time.monotonic()
        if local.leaves_to_us:
            # a rank of ours that doesn't leave in order takes the whole worker along
            self._heir.renounce() if local.left else self._heir.act()
        if local.left or local.told or local.is_watched_elsewhere or self._stop_at < math.inf:
            return
        # anew with each that follows at once: a launcher that ends them all takes its time on a busy node
        self._gone.append(local)
        self._decide_at = time.monotonic() + _SETTLE_SECONDS

    def _decide(self) -> None:
        """Say what has gone, unless they all have at once, or another one has got a signal just then: the launcher ends them all."""
        first = self._gone[0]
        is_ended = self._told_at < first.heard + _SAME_SECONDS
        if not is_ended and (len(self._gone) == 1 or self._ranks):
            self._end(first, death(self._host), Cause.DEATH)

    def _look(self, now: float) -> None:
        if now > self._kill_at:
            self._kill_at = math.inf
            for local in self._ranks:
                local.kill()
        if self._stop_at < math.inf:
            return
        waiting = [local for local in self._ranks if not (local.judged or local.left)]
        if waiting and now - self._began > self._limits.world_seconds:
            self._late(waiting)
            return
        for local in self._ranks:
            patience = self._meeting.patience(local.phase)
            if patience is None or local.left or local.is_watched_elsewhere:
                continue
            if now - local.asked > min(self._meeting.period, patience / 4):
                local.asked = now
                local.send("beat")
            if now - local.heard > patience:
                self._silent(local, now)
                return

    def _silent(self, local: Local, now: float) -> None:
        if local.leaves_to_us:
            self._heir.act()
        self._end(local, silence(now - local.heard, self._host), Cause.SILENCE)
        # the others miss it a little later, and end it with themselves; the launcher knows the better exit code
        others = self._launch.size != 1
        self._kill_at = now + _STUCK_SECONDS + (1.5 * self._meeting.period if others else 0.0)
        self._stop_at = max(self._stop_at, self._kill_at + 2 * _TICK_SECONDS)

    def _late(self, ranks: Sequence[Local]) -> None:
        for local in ranks:
            local.send("stacks")
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and not all(local.stacks for local in ranks):
            for key, _ in self._selector.select(_TICK_SECONDS):
                key.data()
        error = DeadlineError(
            f"no verdict after {self._limits.world_seconds:g} s",
            needed="all ranks of all nodes to start MPI, and to answer rank 0",
            fix="look at the ranks and nodes that are missing or stand apart from the others; --world-timeout gives them longer",
        )
        text = f"{error}\n{describe_late(ranks, self._launch)}"
        failure = self._failure(ranks[0], text, int(error.exit_code), Cause.SILENCE)
        self._report(ranks[0], failure, f"error in {failure.phase}: {text}", for_node=True)
        self._order_end(failure.exit_code)

    def _end(self, local: Local, error: BootstrapError, cause: Cause) -> None:
        report = f"error in {local.phase}: {error}"
        failure = self._failure(local, str(error), int(error.exit_code), cause)
        self._report(local, failure, report)
        self._order_end(failure.exit_code)
        if local.leaves_to_us:
            self._heir.leave_word(failure, self._host, report)

    def _report(self, local: Local, failure: Failure, text: str, *, for_node: bool = False) -> None:
        """Say it and write it down, in two seconds at the most: a file system that hangs must not keep the ranks."""

        def report() -> None:
            self._say(local, text, for_node=for_node)
            write_failure(self._meeting, failure, self._host)

        if (thread := begun(report)) is None:
            suppressed(report)
        else:
            thread.join(_REPORT_SECONDS)

    def _say(self, local: Local, text: str, *, for_node: bool) -> None:
        """Speak for a rank or for the node, and write it to that rank's log file: it can't do that itself."""
        if local.rank >= 0:
            speech.log_to(self._limits.log_dir, self._meeting.label, local.rank)
        speech.speak(None if for_node or local.rank < 0 else local.rank, self._host, text)

    def _order_end(self, code: int) -> None:
        self._stop_at = time.monotonic() + _END_SECONDS
        for local in self._ranks:
            local.send(f"end {code}")

    @staticmethod
    def _failure(local: Local, text: str, code: int, cause: Cause) -> Failure:
        return Failure(local.rank, code, text, cause, local.phase, time.monotonic())


def accompany(
    listener: int | None, first: int, launch: Launch, host: str, argv: Sequence[str], environ: Mapping[str, str]
) -> None:
    """Be the companion, in a process forked for it, until the ranks of this node have no need of one.

    Args:
        listener: the listening socket's descriptor; None for a rank that is alone.
        first: that of the connection to the rank that forked it.
        launch: how that rank was started.
        host: this node.
        argv: the worker's command line, without the program.
        environ: its variables.
    """
    speech.forget()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    at = None if listener is None else socket.socket(fileno=listener)
    companion = Companion(at, socket.socket(fileno=first), launch, host, Limits.of(argv, environ))
    set_title(f"dynamo_mpi: companion of the ranks on {host}")
    companion.run()
