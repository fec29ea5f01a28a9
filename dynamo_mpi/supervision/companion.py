# SPDX-License-Identifier: Apache-2.0
"""The companion of a node's ranks: a process beside them, forked before ``MPI_Init``, that is no rank.

Until the verdict it watches the ranks of its node, which nobody else does: one that dies, is stopped or never comes would leave the others
in MPI's start for ever. From then on liveness does that (`lookout`); rank 0's companion, and that of one other node, stay as heirs:
when rank 0 is killed, or its node is lost, they take the worker out of discovery (`heir`).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.errors import BootstrapError, DeadlineError
from dynamo_mpi.supervision.companion_report import Local, describe_late, prefix
from dynamo_mpi.supervision.failure import Cause, Failure
from dynamo_mpi.supervision.failure_files import write_failure
from dynamo_mpi.supervision.heir import Heir
from dynamo_mpi.supervision.meeting import Meeting
from dynamo_mpi.supervision.title import set_title
from dynamo_mpi.supervision.troubles import death, silence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.launchers.launch import Launch

WORLD_SECONDS = 600.0
"""How long the ranks may take to the verdict by default: a cold container image on hundreds of nodes takes minutes to import from."""
_TICK_SECONDS = 0.25
# mpirun ends the others 0.25 s after it has seen a rank die, Slurm after 0.3: what has gone until then was no consequence
_SETTLE_SECONDS = 0.12
_STACKS_SECONDS = 1.0
_END_SECONDS = 4.0
_STUCK_SECONDS = 1.5
_READ_BYTES = 1 << 16
_MOST_LINE = 1 << 18
_CREDENTIALS = struct.Struct("3i")


class Limits(NamedTuple):
    """What the companion goes by.

    Args:
        heartbeat_timeout: see `Meeting`.
        world_seconds: until the verdict.
        failure_dir: see `Meeting`.
    """

    heartbeat_timeout: float | None = None
    world_seconds: float = WORLD_SECONDS
    failure_dir: str = ""

    @classmethod
    def of(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Limits:
        """Read them from a worker's flags and variables. What can't be read is for rank 0's settings to refuse."""
        heartbeat = _seconds(_early(argv, environ, "--heartbeat-timeout", "DYN_MPI_HEARTBEAT_TIMEOUT"))
        world = _seconds(_early(argv, environ, "--world-timeout", "DYN_MPI_WORLD_TIMEOUT"))
        folder = _early(argv, environ, "--failure-dir", "DYN_MPI_FAILURE_DIR")
        return cls(heartbeat, WORLD_SECONDS if world is None else world, folder)


class Companion:
    """Watches; all of it runs in one thread.

    Args:
        listener: where the ranks of this node connect.
        launch: how the rank was started that forked it.
        host: this node.
        limits: see there.
    """

    def __init__(self, listener: socket.socket, launch: Launch, host: str, limits: Limits) -> None:
        self._listener, self._launch, self._host, self._limits = listener, launch, host, limits
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._began = time.monotonic()
        self._ranks: list[Local] = []
        self._gone: list[Local] = []
        self._decide_at = self._kill_at = self._stop_at = float("inf")
        self._heir = Heir()
        self._over = False
        self._label = "worker"
        self._told_to_stop = float("inf")
        signal.signal(signal.SIGTERM, self._note_stop)

    def run(self) -> None:
        """Watch until all ranks of this node have left, or are ended."""
        while not self._is_over():
            for key, _ in self._selector.select(min(_TICK_SECONDS, max(0.0, self._decide_at - time.monotonic()))):
                key.data()
            now = time.monotonic()
            if now >= self._decide_at:
                self._decide_at = float("inf")
                self._decide()
            self._look(now)
        self._heir.close()

    def _note_stop(self, number: int, frame: object) -> None:
        """Slurm ends a step whole, the companion with it, which stays to the end of its ranks."""
        del number, frame
        self._told_to_stop = min(self._told_to_stop, time.monotonic())

    def _is_over(self) -> bool:
        now = time.monotonic()
        if now > self._stop_at:
            return True
        if self._decide_at < float("inf") or self._ranks:
            return False
        # nobody has come yet: the rank that forked it comes within moments, or has died
        return self._over or now - self._began > _END_SECONDS

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        pid, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        local = Local(connection, pid)
        self._ranks.append(local)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(local))

    def _read(self, local: Local) -> None:
        try:
            data = local.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and len(local.unread) < _MOST_LINE:
            local.heard = time.monotonic()
            *lines, local.unread = (local.unread + data).split(b"\n")
            for line in lines:
                self._take(local, line.decode("utf-8", "replace"))
            return
        self._forget(local)

    def _take(self, local: Local, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "rank" and (numbers := rest.split()) and numbers[0].isdecimal():
            local.rank = int(numbers[0])
        elif word == "phase":
            local.phase = rest
        elif word == "stacks":
            local.stacks = rest.replace("\v", "\n")
        elif word == "leave":
            local.left = self._over = True
        elif word == "told":
            local.told = True
        elif word == "label":
            self._label = rest
        elif word == "failed" and rest.isdecimal():
            local.told = True
            self._order_end(int(rest))
        elif word == "heir":
            local.leaves_to_us = True
            self._heir.inherit(rest)
        elif word == "mourn":
            self._heir.act()

    def _forget(self, local: Local) -> None:
        self._selector.unregister(local.connection)
        local.connection.close()
        self._ranks.remove(local)
        if local.left or self._stop_at < float("inf"):
            if local.leaves_to_us and local.left:
                self._heir.renounce()
            return
        if local.leaves_to_us:
            self._heir.act()
        if local.told:
            self._over = True
            return
        local.heard = time.monotonic()
        self._gone.append(local)
        self._decide_at = min(self._decide_at, time.monotonic() + _SETTLE_SECONDS)

    def _decide(self) -> None:
        """Say what has gone, unless it was the launcher or an operator who ended them all."""
        first = self._gone[0]
        is_first_cause = first.heard < self._told_to_stop < float("inf")
        was_ended = self._told_to_stop <= first.heard or (len(self._gone) > 1 and not self._ranks)
        if was_ended and not is_first_cause:
            self._over = True
            return
        self._end(first, death(self._host), Cause.DEATH)

    def _look(self, now: float) -> None:
        if now > self._kill_at:
            self._kill_at = float("inf")
            for local in self._ranks:
                _kill(local)
        if self._stop_at < float("inf") or not self._ranks:
            return
        if now - self._began > self._limits.world_seconds and not self._over and not self._heir.inherits:
            self._late()
            return
        meeting = Meeting(self._host, heartbeat_timeout=self._limits.heartbeat_timeout)
        for local in self._ranks:
            patience = meeting.patience(local.phase)
            if patience is None or local.left:
                continue
            if now - local.asked > min(meeting.period, patience / 4):
                local.asked = now
                local.send("beat")
            if now - local.heard > patience:
                self._silent(local, now)
                return

    def _silent(self, local: Local, now: float) -> None:
        error = silence(now - local.heard, self._host)
        if local.leaves_to_us:
            self._heir.act()
        self._end(local, error, Cause.SILENCE)
        # the launcher ends it with the others, and knows the better exit code
        self._kill_at = time.monotonic() + _STUCK_SECONDS

    def _late(self) -> None:
        for local in self._ranks:
            local.send("stacks")
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and not all(local.stacks for local in self._ranks):
            for key, _ in self._selector.select(_TICK_SECONDS):
                key.data()
        if not self._ranks:
            return
        error = DeadlineError(
            f"no verdict after {self._limits.world_seconds:g} s",
            needed="all ranks of all nodes to start MPI, and to answer rank 0",
            fix="look at the ranks and nodes that are missing or stand apart from the others; --world-timeout gives them longer",
        )
        text = f"{error}\n{describe_late(self._ranks, self._launch)}"
        self._say(f"{prefix(None, self._host)}error in {self._ranks[0].phase}: {text}")
        self._write(self._ranks[0], text, int(error.exit_code), Cause.SILENCE)
        self._order_end(int(error.exit_code))

    def _end(self, local: Local, error: BootstrapError, cause: Cause) -> None:
        self._say(f"{prefix(local.rank, self._host)}error in {local.phase}: {error}")
        self._write(local, str(error), int(error.exit_code), cause)
        self._order_end(int(error.exit_code))

    def _order_end(self, code: int) -> None:
        self._stop_at = time.monotonic() + _END_SECONDS
        self._over = True
        for local in self._ranks:
            local.send(f"end {code}")

    def _write(self, local: Local, text: str, code: int, cause: Cause) -> None:
        meeting = Meeting(self._host, failure_dir=self._limits.failure_dir, label=self._label)
        failure = Failure(local.rank, code, text, cause, local.phase, time.monotonic())
        write_failure(meeting, failure, self._host)

    @staticmethod
    def _say(text: str) -> None:
        try:
            os.write(2, (text + "\n").encode("utf-8", "replace"))
        except OSError:
            return


def accompany(listener: int, launch: Launch, host: str, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Be the companion, in a process forked for it, until the ranks of this node have no need of one.

    Args:
        listener: the listening socket's descriptor.
        launch: how the rank was started that forked this process.
        host: this node.
        argv: the worker's command line, without the program.
        environ: its variables.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    companion = Companion(socket.socket(fileno=listener), launch, host, Limits.of(argv, environ))
    set_title(f"dynamo_mpi: companion of the ranks on {host}")
    companion.run()


def _kill(local: Local) -> None:
    """End a process that is stopped or stuck: it can't do that itself."""
    try:
        os.kill(local.pid, signal.SIGKILL)
    except OSError:
        return


def _early(argv: Sequence[str], environ: Mapping[str, str], flag: str, variable: str) -> str:
    found = environ.get(variable, "")
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None
