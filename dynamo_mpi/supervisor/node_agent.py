# SPDX-License-Identifier: Apache-2.0
"""The agent of a node: a process forked before ``MPI_Init`` that is not a rank, so that it outlives what MPI does to the ranks.

Until the preflight result, it is the only process that watches the ranks of its node: if one dies, is stopped or is never started, the others
would block in MPI_Init forever. After that it still detects each rank's exit, and the agents of all nodes are connected (`agent_network`).
Rank 0 composes the report of a failure if it can; otherwise its agent does, or, if its node is lost, another node's agent. The agents also
revoke the worker's leases in etcd, and kill the remaining ranks and their descendants.
"""

from __future__ import annotations

import math
import selectors
import socket
import time
from functools import partial

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.light_typing import TYPE_CHECKING, cast
from dynamo_mpi.common.process import ended_by_itself, exit_status
from dynamo_mpi.mpi.launcher import MPICH_LAUNCHERS
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, compose_report, decode_observed, decode_report
from dynamo_mpi.supervisor.agent_socket import peer_is_ours
from dynamo_mpi.supervisor.agent_world import WorldWatch
from dynamo_mpi.supervisor.agent_writer import ReportWriter
from dynamo_mpi.supervisor.failure_reports import heartbeat_missed, no_verdict, rank_ended
from dynamo_mpi.supervisor.leftovers import clear_after, clear_after_ranks, segments_of
from dynamo_mpi.supervisor.local_rank import LocalRank, LocalRanks, RankObserver, describe_missing_ranks
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.config.sources import EarlySettings
    from dynamo_mpi.mpi.launcher import LaunchInfo

_TICK_SECONDS = 0.25
_STALL_SECONDS = 0.5
# mpirun ends the other ranks 0.25 s after a rank dies, Slurm after 0.3 s: ranks that exit earlier are no consequence
_SETTLE_SECONDS = 0.12
# exits within this time are simultaneous: a launcher takes longer to end the other ranks
_SIMULTANEOUS_SECONDS = 0.003
_STACKS_SECONDS = 1.0
_EXIT_GRACE_SECONDS = 4.0
_KILL_DELAY_SECONDS = 1.0
# in a shutdown, the ranks' last barrier and MPI_Finalize take up to 20 s each
_SHUTDOWN_GRACE_SECONDS = 45.0
_RETRY_SECONDS = 0.05


class NodeAgent:
    """The agent. Everything runs in one thread, except what waits for files and etcd.

    Args:
        listener: the socket to which the other ranks of this node connect; None in a world of one rank.
        first: the connection to the rank that started the agent.
        launch: how that rank was started.
        host: this node.
        settings: the agent's settings.
        observer: shows the state of the rank that started the agent; None if nothing does.
    """

    def __init__(
        self,
        listener: socket.socket | None,
        first: socket.socket,
        launch: LaunchInfo,
        host: str,
        settings: EarlySettings,
        observer: RankObserver | None = None,
    ) -> None:
        self._launch, self._host, self._world_timeout = launch, host, settings.world_timeout
        self._selector, self._writer = selectors.DefaultSelector(), ReportWriter(settings.log_dir)
        rendezvous = Rendezvous(host, heartbeat_timeout=settings.heartbeat_timeout, failure_dir=settings.failure_dir)
        local_ranks = LocalRanks(host, self._end_local_ranks, self._rank0_reports)
        self._watch = WorldWatch(self._selector, launch, local_ranks, self._writer, rendezvous)
        self._ranks, self._disconnected = list[LocalRank](), list[LocalRank]()
        # ranks that have closed their connection and whose process still runs
        self._exiting: set[LocalRank] = set()
        self._exit_deadline = 0.0
        self._segments: frozenset[str] = frozenset()
        self._lost_ranks, self._started_at, self._xids = False, time.monotonic(), cast("object", None)
        self._decide_at = self._kill_at = self._stop_at = self._reported_at = math.inf
        self._observer, self._first = observer, self._add_rank(first)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def run(self, began: float) -> None:
        """Run until all ranks of this node have exited.

        Args:
            began: when the rank that started the agent began, in seconds since 1970. On a busy node, that rank may be in MPI_Init before
                the agent's first line runs.
        """
        next_tick = time.monotonic() + _TICK_SECONDS
        while not self._is_done():
            wait = min(next_tick, self._decide_at, self._watch.decide_at) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, wait)):
                key.data()
            self._watch.answer()
            now = time.monotonic()
            if now >= self._decide_at:
                self._decide_at = math.inf
                self._report_disconnected()
            if now >= self._watch.decide_at:
                self._watch.decide()
            if now >= next_tick:
                self._compensate_stall(now - next_tick)
                self._check(now)
                next_tick = time.monotonic() + _TICK_SECONDS
        if not self._ranks:
            lost_since = began if self._lost_ranks else None
            clear_after_ranks(self._segments, lost_since, mpich=self._launch.launcher in MPICH_LAUNCHERS)
        if self._observer is not None:
            self._observer.on_exit()
        self._writer.finish()
        self._watch.close()

    def _is_done(self) -> bool:
        now = time.monotonic()
        has_ranks = self._ranks or (self._exiting and now < self._exit_deadline)
        return now > self._stop_at or not (has_ranks or self._decide_at < math.inf or self._watch.is_waiting)

    def _compensate_stall(self, late: float) -> None:
        """If this process was stopped, extend the ranks' timeouts accordingly."""
        if late > _STALL_SECONDS:
            self._started_at += late
            for local in self._ranks:
                local.last_seen += late
                local.last_ping += late
            if self._observer is not None:
                self._observer.on_message("")

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # for instance too many open files; the listener stays readable
            time.sleep(_RETRY_SECONDS)
            return
        if peer_is_ours(connection):
            self._add_rank(connection)
        else:
            connection.close()

    def _add_rank(self, connection: socket.socket) -> LocalRank:
        local = LocalRank(connection)
        self._ranks.append(local)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(local))
        if local.pidfd is not None:
            # a fork of the rank may keep its connection open
            self._selector.register(local.pidfd, selectors.EVENT_READ, lambda: self._on_process_exit(local))
        return local

    def _observer_of(self, local: LocalRank) -> RankObserver | None:
        return self._observer if local is self._first else None

    def _read(self, local: LocalRank, *, has_exited: bool = False) -> None:
        # the rank was removed earlier in the same round
        if local not in self._ranks:
            return
        lines, is_closed = local.read()
        for line in lines:
            self._handle_message(local, line)
        if is_closed or has_exited:
            self._on_disconnect(local)

    def _on_process_exit(self, local: LocalRank) -> None:
        """Handle the exit of a rank's process."""
        # first the lines that it sent before
        self._read(local, has_exited=True)
        self._selector.unregister(cast("int", local.pidfd))
        local.close_process()
        self._exiting.discard(local)
        self._on_exit(local)

    def _on_exit(self, local: LocalRank, excluded: frozenset[int] = frozenset()) -> None:
        if observer := self._observer_of(local):
            observer.on_exit()
        if local.mark:
            self._writer.later(partial(clear_after, local.mark, local.inode, excluded, local.caches))

    def _handle_message(self, local: LocalRank, line: str) -> None:
        """Handle a line that a rank of this node sends about itself."""
        key, _, value = line.partition(" ")
        if observer := self._observer_of(local):
            observer.on_message(value if key == "health" else "")
        if local.note(key, value):
            if key == "phase" and local.rank == 0:
                self._watch.set_phase(value)
        elif key == "reported":
            local.reported = True
            self._reported_at = min(self._reported_at, time.monotonic())
            if local.rank == 0 and local.preflight_done:
                # it is the report for the whole world
                self._watch.set_reported()
        elif key == "failed" and value.isdecimal():
            local.reported = True
            self._watch.set_reported(int(value))
        else:
            self._handle_world_message(local, key, value)

    def _handle_world_message(self, local: LocalRank, key: str, value: str) -> None:
        """Handle a line that a rank of this node sends about the world."""
        if key == "listener" and local.descriptors:
            self._watch.set_listener(socket.socket(fileno=local.descriptors.pop()))
        elif key == "agents":
            self._watch.connect_agents(local.rank, value)
        elif key == "preflight_done":
            local.preflight_done = True
            local.segments |= segments_of(local.pid)
            self._watch.join(local.rank, value)
        elif key == "leases":
            self._watch.set_leases(value)
        elif key == "signalled":
            self._watch.note_signal(local.rank)
        elif key == "failure" and (observed := decode_observed(value)) is not None:
            # its exit is a consequence
            local.reported = True
            self._watch.on_failure(observed)
        elif key == "report" and (report := decode_report(value)) is not None:
            self._watch.publish(report, lambda: local.send("published"))
        elif key == "rank0_lost" and (observed := decode_observed(value)) is not None:
            self._watch.on_rank0_lost(observed)
        elif key == "gpus" and not self._xids:
            from dynamo_mpi.supervisor.xid_watch import XidWatch

            self._xids = XidWatch(self._selector, self._host, value.split(), self._watch.note_gpu_error)

    def _on_disconnect(self, local: LocalRank) -> None:
        """Remove a rank that has disconnected, and decide whether it failed."""
        self._ranks.remove(local)
        self._selector.unregister(local.connection)
        local.close()
        local.last_seen = now = time.monotonic()
        # at once: its parent is about to reap it
        local.exit_status = exit_status(local.pid)
        # its descendants are killed after its process has exited
        if local.pidfd is not None:
            self._exiting.add(local)
            self._exit_deadline = now + _SHUTDOWN_GRACE_SECONDS
        else:
            self._on_exit(local, frozenset({local.pid}))
        if not local.detached:
            self._lost_ranks, self._segments = True, self._segments | local.segments
        if local.rank == 0:
            self._watch.on_rank0_exit(in_order=local.detached)
        if self._watch.history.was_ended_by_launcher(local.rank):
            if local.rank == 0:
                self._watch.close_world()
            return
        if local.detached or local.reported or self._stop_at < math.inf:
            return
        if local.preflight_done or self._watch.has_network:
            self._watch.on_failure(
                ObservedFailure(self._failure(local, self._end_of(local), DetectedBy.DISCONNECT), self._host)
            )
            return
        # restarted with each further rank: on a busy node, a launcher takes time to end all ranks
        self._disconnected.append(local)
        self._decide_at = now + (_SETTLE_SECONDS if self._launch.local_size != 1 else 0.0)

    def _end_of(self, local: LocalRank) -> DynamoMpiError:
        return rank_ended(self._host, local.phase, local.exit_status, self._launch.launcher)

    def _rank0_reports(self) -> bool:
        return any(local.rank == 0 and local.preflight_done for local in self._ranks)

    def _report_disconnected(self) -> None:
        """Report a rank that exited before the result, unless the launcher may have ended it: all exit at once, or another got a signal."""
        first, *others = self._disconnected
        is_own = ended_by_itself(first.exit_status)
        is_ended = not is_own and self._reported_at < first.last_seen + _SIMULTANEOUS_SECONDS
        if not (is_ended or self._watch.reported) and (is_own or not others or self._ranks):
            self._report(first, self._end_of(first), DetectedBy.DISCONNECT)

    def _check(self, now: float) -> None:
        self._watch.tick()
        if self._observer is not None and self._first.detached:
            # it exits in order, and answers nothing any more; its exit has a time limit of its own
            self._observer.on_message("")
        if self._launch.launcher in MPICH_LAUNCHERS:
            for local in self._ranks:
                if local.phase == "mpi_init":
                    # a rank that is killed in MPI_Init can't report them itself
                    local.segments |= segments_of(local.pid)
        if now > self._kill_at:
            self._kill_at = math.inf
            for local in (*self._ranks, *self._exiting):
                local.kill()
        if self._stop_at < math.inf:
            return
        waiting = [local for local in self._ranks if not (local.preflight_done or local.detached)]
        if waiting and now - self._started_at > self._world_timeout:
            self._report_missing(waiting)
            return
        rendezvous = self._watch.rendezvous
        for local in self._ranks:
            timeout = None if local.is_watched_by_rank0 else rendezvous.heartbeat_timeout_for(local.phase)
            if local.detached or (timeout is None and self._observer_of(local) is None):
                continue
            if now - local.last_ping > min(rendezvous.heartbeat_interval, math.inf if timeout is None else timeout / 4):
                local.last_ping = now
                local.send("ping")
            if timeout is not None and now - local.last_seen > timeout:
                self._report_hung(local, now)
                return

    def _report_hung(self, local: LocalRank, now: float) -> None:
        if local.rank == 0:
            self._writer.revoke()
        self._report(local, heartbeat_missed(now - local.last_seen, self._host), DetectedBy.HEARTBEAT)
        # the other ranks detect it a little later and end the world, and the launcher has the better exit code
        others = self._launch.size != 1 and local.preflight_done
        self._kill_at = now + _KILL_DELAY_SECONDS + (1.5 * self._watch.rendezvous.heartbeat_interval if others else 0.0)
        self._stop_at = max(self._stop_at, self._kill_at + 2 * _TICK_SECONDS)

    def _report_missing(self, ranks: Sequence[LocalRank]) -> None:
        for local in ranks:
            local.send("stacks")
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and not all(local.stacks for local in ranks):
            for key, _ in self._selector.select(_TICK_SECONDS):
                key.data()
        error = no_verdict(self._world_timeout)
        text = f"{error}\n{describe_missing_ranks(ranks, self._launch)}"
        failure = self._failure(ranks[0], error, DetectedBy.HEARTBEAT)._replace(text=text)
        report = compose_report([ObservedFailure(failure, self._host)], failure.phase)
        # each node reports which of its ranks are missing
        self._watch.report(report, for_node=True)
        self._end_local_ranks(failure.exit_code)

    def _report(self, local: LocalRank, error: DynamoMpiError, cause: DetectedBy) -> None:
        """Report a rank's failure and end all ranks."""
        failure = self._failure(local, error, cause)
        self._watch.report(compose_report([ObservedFailure(failure, self._host)], failure.phase))
        self._watch.end_all(failure.exit_code)

    def _failure(self, local: LocalRank, error: DynamoMpiError, cause: DetectedBy) -> Failure:
        phase = (self._watch.history.phase if local.rank == 0 else "") or local.phase
        return Failure(local.rank, int(error.exit_code), str(error), cause, phase, time.monotonic())

    def _end_local_ranks(self, code: int) -> None:
        now = time.monotonic()
        self._stop_at = min(self._stop_at, now + _EXIT_GRACE_SECONDS)
        self._kill_at = min(self._kill_at, now + _KILL_DELAY_SECONDS)
        for local in self._ranks:
            local.send(f"end {code}")
