# SPDX-License-Identifier: Apache-2.0
"""The agent of a node's ranks: a process beside them, forked before ``MPI_Init``, that is no rank and so outlives whatever MPI does to them.

Until the verdict it watches the ranks of its node, which no other process does: one that dies, is stopped or never comes would leave the
others in MPI's start for ever. From then on it sees each of them end, and the agents of all nodes know of each other (`agent_network`).
Rank 0 composes the report of a failure where it can; if it doesn't, its agent does, or, where its node is lost, that of another. They also
revoke what the worker has in etcd, end what is left of its ranks, and what those have started.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, cast

from dynamo_mpi.common.errors import DynamoMpiError, PhaseTimeoutError
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.process_title import set_process_title
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_failures import Seen, describe_seen, read_report, read_seen
from dynamo_mpi.supervisor.agent_socket import peer_is_ours
from dynamo_mpi.supervisor.agent_world import WorldWatch
from dynamo_mpi.supervisor.agent_writer import ReportWriter
from dynamo_mpi.supervisor.descendants import end_descendants
from dynamo_mpi.supervisor.early_settings import Limits
from dynamo_mpi.supervisor.failure_messages import heartbeat_missed, rank_died
from dynamo_mpi.supervisor.local_rank import LocalRank, describe_missing_ranks
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.supervisor.shared_memory import remove_segments, segments_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.mpi.launcher import LaunchInfo

_TICK_SECONDS = 0.25
_STALL_SECONDS = 0.5
# mpirun ends the others 0.25 s after it has seen a rank die, Slurm after 0.3: what has gone until then was no consequence
_SETTLE_SECONDS = 0.12
# what came in one round; a launcher that ends the others because one has gone takes longer
_SAME_SECONDS = 0.003
_STACKS_SECONDS = 1.0
_END_SECONDS = 4.0
_STUCK_SECONDS = 1.0
# ranks that leave in order meet, and end MPI, each within 20 s
_LEAVE_SECONDS = 45.0
_AGAIN_SECONDS = 0.05


class NodeAgent:
    """Watches; all of it runs in one thread, but for what waits for files and etcd.

    Args:
        listener: where the other ranks of this node connect; None for a rank that is alone.
        first: a connection to the rank that started it.
        launch: how that rank was started.
        host: this node.
        limits: see there.
    """

    def __init__(
        self, listener: socket.socket | None, first: socket.socket, launch: LaunchInfo, host: str, limits: Limits
    ) -> None:
        self._launch, self._host, self._limits = launch, host, limits
        self._selector = selectors.DefaultSelector()
        self._writer = ReportWriter(limits.log_dir)
        meeting = Rendezvous(host, heartbeat_timeout=limits.heartbeat_timeout, failure_dir=limits.failure_dir)
        self._world = WorldWatch(
            self._selector, launch, host, self._writer, meeting, self._end_ranks, self._rank_0_reports
        )
        self._ranks: list[LocalRank] = []
        self._gone: list[LocalRank] = []
        # those that have closed their connection, and whose process is still there
        self._leaving: set[LocalRank] = set()
        self._leave_by = 0.0
        self._segments: frozenset[str] = frozenset()
        self._began = time.monotonic()
        self._decide_at = self._kill_at = self._stop_at = self._reported_at = math.inf
        self._admit(first)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def run(self) -> None:
        """Watch until all ranks of this node have left, or are ended."""
        due = time.monotonic() + _TICK_SECONDS
        while not self._is_over():
            wait = min(due, self._decide_at, self._world.decide_at) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, wait)):
                key.data()
            self._world.answer()
            now = time.monotonic()
            if now >= self._decide_at:
                self._decide_at = math.inf
                self._report_gone()
            if now >= self._world.decide_at:
                self._world.decide()
            if now >= due:
                self._compensate_stall(now - due)
                self._look(now)
                due = time.monotonic() + _TICK_SECONDS
        # a launcher that is well does so itself, and while a rank lives they are in use
        if not self._ranks:
            remove_segments(self._segments)
        self._writer.finish()
        self._world.close()

    def _is_over(self) -> bool:
        if time.monotonic() > self._stop_at:
            return True
        is_leaving = self._leaving and time.monotonic() < self._leave_by
        return not (self._ranks or is_leaving or self._decide_at < math.inf or self._world.is_waiting)

    def _compensate_stall(self, late: float) -> None:
        """Where it was this process that stood still, that is not held against the ranks."""
        if late > _STALL_SECONDS:
            self._began += late
            for local in self._ranks:
                local.heard += late
                local.asked += late

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # too many open files, say: it stays readable
            time.sleep(_AGAIN_SECONDS)
            return
        if peer_is_ours(connection):
            self._admit(connection)
        else:
            connection.close()

    def _admit(self, connection: socket.socket) -> None:
        local = LocalRank(connection)
        self._ranks.append(local)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(local))
        if local.pidfd is not None:
            # what the rank has forked may hold its connection open
            self._selector.register(local.pidfd, selectors.EVENT_READ, lambda: self._ended(local))

    def _read(self, local: LocalRank) -> None:
        # one that was forgotten in the same round
        if local not in self._ranks:
            return
        lines, is_over = local.read()
        for line in lines:
            self._take(local, line)
        if is_over:
            self._forget(local)

    def _ended(self, local: LocalRank) -> None:
        """The process of a rank has ended."""
        if local in self._ranks:
            # what it has said before comes first
            for line in local.read()[0]:
                self._take(local, line)
            self._forget(local)
        self._selector.unregister(cast("int", local.pidfd))
        local.close_process()
        self._leaving.discard(local)
        if local.mark:
            self._writer.later(partial(end_descendants, local.mark, local.inode))

    def _take(self, local: LocalRank, line: str) -> None:
        """Do what a rank of this node says about itself."""
        word, _, rest = line.partition(" ")
        if word == "rank" and rest.isdecimal():
            local.rank = int(rest)
            local.send(f"agent {os.getpid()}")
        elif word == "mark":
            mark, _, inode = rest.partition(" ")
            local.mark, local.inode = mark, int(inode) if inode.isdecimal() else 0
        elif word == "phase":
            local.phase = rest
            if local.rank == 0:
                self._world.set_phase(rest)
        elif word == "stacks":
            local.stacks = rest.replace("\v", "\n")
        elif word == "segments":
            local.segments |= frozenset(rest.split())
        elif word == "detach":
            local.detached = True
        elif word == "reported":
            local.reported = True
            self._reported_at = min(self._reported_at, time.monotonic())
            if local.rank == 0 and local.preflight_done:
                # the whole world's report
                self._world.set_reported()
        elif word == "failed" and rest.isdecimal():
            local.reported = True
            self._world.set_reported()
            self._world.end_all(int(rest))
        else:
            self._hand_on(local, word, rest)

    def _hand_on(self, local: LocalRank, word: str, rest: str) -> None:
        """Do what a rank of this node says about the world."""
        if word == "listener" and local.descriptors:
            self._world.take_listener(socket.socket(fileno=local.descriptors.pop()))
        elif word == "agents":
            self._world.join_early(local.rank, rest)
        elif word == "preflight_done":
            local.preflight_done = True
            local.segments |= segments_of(local.pid)
            self._world.join(local.rank, rest)
        elif word == "leases":
            self._world.set_leases(rest)
        elif word == "signalled":
            self._world.note_signal(local.rank)
        elif word == "failure" and (seen := read_seen(rest)) is not None:
            # its end follows from that
            local.reported = True
            self._world.failed(seen)
        elif word == "report" and (report := read_report(rest)) is not None:
            self._world.publish(report, lambda: local.send("published"))
        elif word == "rank0_lost" and (seen := read_seen(rest)) is not None:
            self._world.lost_rank_0(seen)

    def _forget(self, local: LocalRank) -> None:
        """Take note of a rank's end, and of what it is."""
        self._ranks.remove(local)
        self._selector.unregister(local.connection)
        local.close()
        local.heard = now = time.monotonic()
        # what it has started is ended once its process has ended
        if local.pidfd is not None:
            self._leaving.add(local)
            self._leave_by = now + _LEAVE_SECONDS
        elif local.mark:
            self._writer.later(partial(end_descendants, local.mark, local.inode, frozenset({local.pid})))
        if not local.detached:
            self._segments |= local.segments
        if local.rank == 0:
            self._world.rank_0_left(in_order=local.detached)
        if self._world.history.was_ended_by_launcher(local.rank):
            if local.rank == 0:
                self._world.close_world()
            return
        if local.detached or local.reported or self._stop_at < math.inf:
            return
        if local.preflight_done or self._world.is_joined:
            self._world.failed(Seen(self._failure(local, rank_died(self._host), DetectedBy.DISCONNECT), self._host))
            return
        # anew with each that follows at once: a launcher that ends them all takes its time on a busy node
        self._gone.append(local)
        self._decide_at = now + (_SETTLE_SECONDS if self._launch.local_size != 1 else 0.0)

    def _rank_0_reports(self) -> bool:
        return any(local.rank == 0 and local.preflight_done for local in self._ranks)

    def _report_gone(self) -> None:
        """Report what has gone before MPI runs, unless they all have at once, or another one has got a signal just then: the launcher ends
        them all."""
        first = self._gone[0]
        is_ended = self._reported_at < first.heard + _SAME_SECONDS
        if not (is_ended or self._world.reported) and (len(self._gone) == 1 or self._ranks):
            self._report(first, rank_died(self._host), DetectedBy.DISCONNECT)

    def _look(self, now: float) -> None:
        self._world.tick()
        if self._launch.launcher is Launcher.HYDRA:
            for local in self._ranks:
                if local.phase == "mpi_init":
                    # one that is killed while MPI starts can't say it any more
                    local.segments |= segments_of(local.pid)
        if now > self._kill_at:
            self._kill_at = math.inf
            for local in (*self._ranks, *self._leaving):
                local.kill()
        if self._stop_at < math.inf:
            return
        waiting = [local for local in self._ranks if not (local.preflight_done or local.detached)]
        if waiting and now - self._began > self._limits.world_seconds:
            self._late(waiting)
            return
        meeting = self._world.meeting
        for local in self._ranks:
            patience = meeting.heartbeat_timeout_for(local.phase)
            if patience is None or local.detached or local.is_watched_elsewhere:
                continue
            if now - local.asked > min(meeting.heartbeat_interval, patience / 4):
                local.asked = now
                local.send("ping")
            if now - local.heard > patience:
                self._silent(local, now)
                return

    def _silent(self, local: LocalRank, now: float) -> None:
        if local.rank == 0:
            self._writer.revoke()
        self._report(local, heartbeat_missed(now - local.heard, self._host), DetectedBy.HEARTBEAT)
        # the others miss it a little later, and end it with themselves; the launcher knows the better exit code
        others = self._launch.size != 1 and local.preflight_done
        self._kill_at = now + _STUCK_SECONDS + (1.5 * self._world.meeting.heartbeat_interval if others else 0.0)
        self._stop_at = max(self._stop_at, self._kill_at + 2 * _TICK_SECONDS)

    def _late(self, ranks: Sequence[LocalRank]) -> None:
        for local in ranks:
            local.send("stacks")
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and not all(local.stacks for local in ranks):
            for key, _ in self._selector.select(_TICK_SECONDS):
                key.data()
        error = PhaseTimeoutError(
            f"no verdict after {self._limits.world_seconds:g} s",
            needed="all ranks of all nodes to start MPI, and to answer rank 0",
            fix="look at the ranks and nodes that are missing or stand apart from the others; --world-timeout gives them longer",
        )
        text = f"{error}\n{describe_missing_ranks(ranks, self._launch)}"
        failure = self._failure(ranks[0], error, DetectedBy.HEARTBEAT)._replace(text=text)
        report = describe_seen([Seen(failure, self._host)], failure.phase)
        # each node says which of its ranks are missing
        self._world.report(report, for_node=True)
        self._end_ranks(failure.exit_code)

    def _report(self, local: LocalRank, error: DynamoMpiError, cause: DetectedBy) -> None:
        """Report what has become of a rank, and end all."""
        failure = self._failure(local, error, cause)
        self._world.report(describe_seen([Seen(failure, self._host)], failure.phase))
        self._world.end_all(failure.exit_code)

    def _failure(self, local: LocalRank, error: DynamoMpiError, cause: DetectedBy) -> Failure:
        phase = (self._world.history.phase if local.rank == 0 else "") or local.phase
        return Failure(local.rank, int(error.exit_code), str(error), cause, phase, time.monotonic())

    def _end_ranks(self, code: int) -> None:
        now = time.monotonic()
        self._stop_at = min(self._stop_at, now + _END_SECONDS)
        self._kill_at = min(self._kill_at, now + _STUCK_SECONDS)
        for local in self._ranks:
            local.send(f"end {code}")


def run_node_agent(
    listener: int | None, first: int, launch: LaunchInfo, host: str, argv: Sequence[str], environ: Mapping[str, str]
) -> None:
    """Be the agent, in a process of its own, until the ranks of this node have no need of one.

    Args:
        listener: the listening socket's descriptor; None for a rank that is alone.
        first: that of the connection to the rank that started it.
        launch: how that rank was started.
        host: this node.
        argv: the worker's command line, without the program.
        environ: its variables.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    at = None if listener is None else socket.socket(fileno=listener)
    agent = NodeAgent(at, socket.socket(fileno=first), launch, host, Limits.of(argv, environ))
    set_process_title(f"dynamo_mpi: node agent on {host}")
    agent.run()
