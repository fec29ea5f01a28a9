# SPDX-License-Identifier: Apache-2.0
"""The agent of a node's ranks: a process beside them, forked before ``MPI_Init``, that is no rank and so outlives whatever MPI does to them.

Until the verdict it watches the ranks of its node, which no other process does: one that dies, is stopped or never comes would leave the
others in MPI's start for ever. From then on it sees each of them end, and the agents of all nodes know of each other (`agent_network`).
Rank 0 composes the report of a failure where it can; if it doesn't, its agent does, or, where its node is lost, that of another. They also
revoke what the worker has in etcd, end what is left of its ranks, and what those have started.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import BootstrapError, DeadlineError
from dynamo_mpi.launchers.launch import Launcher
from dynamo_mpi.supervision.agent_failures import (
    Seen,
    describe_seen,
    pack_seen,
    read_report,
    read_seen,
    sorted_seen,
)
from dynamo_mpi.supervision.agent_network import HUB, AgentNetwork
from dynamo_mpi.supervision.agent_socket import peer_is_ours
from dynamo_mpi.supervision.agent_writer import ReportWriter
from dynamo_mpi.supervision.descendants import end_descendants
from dynamo_mpi.supervision.early_settings import Limits
from dynamo_mpi.supervision.failure import Cause, Failure
from dynamo_mpi.supervision.local_rank import LocalRank, describe_missing_ranks
from dynamo_mpi.supervision.meeting import Meeting
from dynamo_mpi.supervision.shared_memory import remove_segments, segments_of
from dynamo_mpi.supervision.title import set_title
from dynamo_mpi.supervision.troubles import death, silence

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
# a rank that lives reports by itself, with what it knows beyond what is seen here
_RANK_0_SECONDS = 2.0
# the deputy leaves it to the hub for so long; a hub that is gone together with rank 0 gets no successor
_HUB_SECONDS = 1.5
_HUB_GONE_SECONDS = 0.05
# an agent whose ranks have died waits until the cause is reported
_LINGER_SECONDS = 3.0
# a launcher that was told to end the ranks kills those that don't end after some seconds
_SIGNALLED_SECONDS = 5.0
_FLUSH_SECONDS = 0.5


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
        self, listener: socket.socket | None, first: socket.socket, launch: Launch, host: str, limits: Limits
    ) -> None:
        self._launch, self._host, self._limits = launch, host, limits
        self._meeting = Meeting(host, heartbeat_timeout=limits.heartbeat_timeout, failure_dir=limits.failure_dir)
        self._selector = selectors.DefaultSelector()
        self._writer = ReportWriter(limits.log_dir)
        self._ranks: list[LocalRank] = []
        self._gone: list[LocalRank] = []
        self._began = time.monotonic()
        self._decide_at = self._kill_at = self._stop_at = self._reported_at = self._stay_until = math.inf
        # from the verdict on
        self._network: AgentNetwork | None = None
        self._hub_listener: socket.socket | None = None
        self._is_hub = self._is_deputy = False
        self._deputy: tuple[int, dict[str, Any]] | None = None
        self._leases = ""
        self._world_phase = ""
        self._seen: list[Seen] = []
        self._reported = self._closing = self._rank_0_gone = False
        self._end_code = 0
        self._segments: frozenset[str] = frozenset()
        self._signalled_at: dict[int, float] = {}
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
                self._compensate_stall(now - due)
                self._look(now)
                due = time.monotonic() + _TICK_SECONDS
        # a launcher that is well does so itself, and while a rank lives they are in use
        if not self._ranks:
            remove_segments(self._segments)
        self._writer.finish()
        if self._network is not None:
            self._network.flush(_FLUSH_SECONDS)
            self._network.close()

    def _is_over(self) -> bool:
        now = time.monotonic()
        if now > self._stop_at:
            return True
        # what is left to decide once the report is out is how ranks end: of other nodes, if here are none
        undecided = self._decide_at < math.inf and not (self._reported and self._network is None)
        if self._ranks or undecided:
            return False
        # with its ranks gone, this agent is needed until the cause is known
        return self._closing or self._reported or self._network is None or not self._seen or now > self._stay_until

    def _compensate_stall(self, late: float) -> None:
        """Where it was this process that stood still, that is not held against the ranks."""
        if late > _STALL_SECONDS:
            self._began += late
            for local in self._ranks:
                local.heard += late
                local.asked += late

    # -- the ranks of this node ----------------------------------------------------------------------------------------

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
        lines = local.read()
        for line in lines or ():
            self._take(local, line)
        if lines is None:
            self._forget(local)

    def _ended(self, local: LocalRank) -> None:
        # what it has said before comes first
        while local in self._ranks and (lines := local.read()):
            for line in lines:
                self._take(local, line)
        if local in self._ranks:
            self._forget(local)

    def _take(self, local: LocalRank, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "rank" and rest.isdecimal():
            local.rank = int(rest)
        elif word == "mark":
            mark, _, inode = rest.partition(" ")
            local.mark, local.inode = mark, int(inode) if inode.isdecimal() else 0
        elif word == "phase":
            local.phase = rest
            if rest != "world":
                local.segments |= segments_of(local.pid)
            if local.rank == 0:
                self._world_phase = rest
                self._broadcast({"phase": rest})
        elif word == "stacks":
            local.stacks = rest.replace("\v", "\n")
        elif word == "component":
            self._meeting = self._meeting._replace(label=rest)
        elif word == "listener" and local.descriptors:
            self._hub_listener = socket.socket(fileno=local.descriptors.pop())
        elif word == "preflight_done":
            local.preflight_done = True
            local.segments |= segments_of(local.pid)
            self._join_world(local, rest)
        elif word == "detach":
            local.detached = True
        elif word == "reported":
            local.reported = True
            self._reported_at = min(self._reported_at, time.monotonic())
        elif word == "signalled":
            self._signalled_at[local.rank] = time.monotonic()
            self._broadcast({"signalled": local.rank})
        elif word == "failed" and rest.isdecimal():
            local.reported = True
            self._end_ranks(int(rest))
        else:
            self._take_content(local, word, rest)

    def _take_content(self, local: LocalRank, word: str, rest: str) -> None:
        if word == "leases":
            self._leases = rest
            self._writer.set_leases(rest)
            if self._deputy is not None and self._network is not None:
                self._network.send(self._deputy[0], {"leases": rest})
        elif word == "failure" and (seen := read_seen(rest)) is not None:
            # its end follows from that
            local.reported = True
            self._failed(seen)
        elif word == "report" and self._reported:
            local.send("published")
        elif word == "report" and (report := read_report(rest)) is not None:
            self._reported, self._end_code = True, report.failure.exit_code
            self._decide_at = math.inf
            self._broadcast({"reported": True})
            self._writer.publish(report, self._meeting, 0, lambda: local.send("published"))
        elif word == "rank0_lost" and (seen := read_seen(rest)) is not None:
            self._lost_rank_0(seen)

    def _forget(self, local: LocalRank) -> None:
        self._ranks.remove(local)
        self._selector.unregister(local.connection)
        if local.pidfd is not None:
            self._selector.unregister(local.pidfd)
        local.close()
        local.heard = now = time.monotonic()
        if local.mark:
            self._writer.later(partial(end_descendants, local.mark, local.inode))
        if not local.detached:
            self._segments |= local.segments
        if local.rank == 0:
            self._forget_rank_0(local)
        was_told_to = self._was_told_to_end(local.rank, now)
        if local.detached or local.reported or self._stop_at < math.inf or was_told_to:
            if local.rank == 0 and was_told_to and not self._seen:
                self._close_world()
            return
        if local.preflight_done:
            error = death(self._host)
            phase = self._world_phase if local.rank == 0 else local.phase
            failure = Failure(local.rank, int(error.exit_code), str(error), Cause.DEATH, phase, now)
            self._failed(Seen(failure, self._host))
            return
        # anew with each that follows at once: a launcher that ends them all takes its time on a busy node
        self._gone.append(local)
        self._decide_at = now + _SETTLE_SECONDS

    def _was_told_to_end(self, rank: int, now: float) -> bool:
        """Return whether a launcher that was told to end the ranks has ended this one: it has sent a signal to all of them before."""
        recent = [other for other, at in self._signalled_at.items() if now - at < _SIGNALLED_SECONDS]
        # rank 0 alone is asked to drain
        return rank in recent and (rank != 0 or self._launch.size == 1 or len(recent) > 1)

    def _forget_rank_0(self, local: LocalRank) -> None:
        if local.detached:
            self._writer.clear_leases()
            self._close_world()
            return
        # a rank of ours that doesn't leave in order takes the whole worker along
        self._writer.revoke()
        self._rank_0_gone = True
        if self._reported:
            # it has been ended before it could end the others
            self._decide_at = time.monotonic() + _SETTLE_SECONDS
        elif self._seen:
            self._decide_at = time.monotonic()

    # -- the world -----------------------------------------------------------------------------------------------------

    def _join_world(self, local: LocalRank, text: str) -> None:
        """Take part in the watch over the whole world, as soon as a rank says where its agents meet."""
        try:
            content = json.loads(text)
            meeting = Meeting(**content["meeting"])
        except (ValueError, KeyError, TypeError):
            return
        self._meeting = meeting
        self._is_hub |= local.rank == 0
        if self._network is not None or not meeting.agent_port:
            return
        network = AgentNetwork(self._selector, local.rank, meeting.agent_token, self._heard, self._lost_agent)
        self._network = network
        if self._is_hub and self._hub_listener is not None:
            network.listen(self._hub_listener)
        else:
            network.connect(HUB, meeting.host, meeting.address, meeting.agent_port)

    def _failed(self, seen: Seen) -> None:
        """A rank has failed, here or elsewhere."""
        if self._reported or self._closing or self._stop_at < math.inf:
            return
        self._seen.append(seen)
        self._writer.revoke()
        now = time.monotonic()
        self._stay_until = now + _LINGER_SECONDS
        self._rank_0_gone |= seen.failure.rank == 0 and seen.failure.cause is not Cause.TOLD
        if not self._is_hub and self._network is not None:
            # also to the deputy
            if seen.host == self._host:
                self._network.broadcast({"failure": pack_seen(seen)})
            if self._is_deputy and self._rank_0_gone:
                self._decide_at = min(self._decide_at, now + self._hub_patience)
            return
        if self._deputy is not None and self._network is not None:
            self._network.send(self._deputy[0], {"failure": pack_seen(seen)})
        if self._launch.launcher is Launcher.HYDRA and seen.failure.cause is Cause.DEATH:
            # mpiexec kills all others at once, and the way to its output with them
            patience = 0.0
        else:
            patience = _SETTLE_SECONDS if self._rank_0_gone else _RANK_0_SECONDS
        self._decide_at = min(self._decide_at, now + patience)

    @property
    def _hub_patience(self) -> float:
        is_there = self._network is not None and HUB in self._network.agents
        return _HUB_SECONDS if is_there else _HUB_GONE_SECONDS

    def _lost_rank_0(self, seen: Seen) -> None:
        """A rank of this node, or of another, can't reach rank 0 any more."""
        if not self._is_hub:
            self._failed(seen)
            if self._is_deputy and not (self._reported or self._closing):
                self._decide_at = min(self._decide_at, time.monotonic() + self._hub_patience)

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        if self._network is None:
            return
        if message.get("joined"):
            self._welcome(number)
        if message.get("deputy"):
            self._become_deputy()
        if isinstance(place := message.get("listens"), dict):
            self._deputy = number, place
            for other in self._network.agents:
                if other != number:
                    self._network.send(other, {"deputy_at": [number, place]})
        if isinstance(at := message.get("deputy_at"), list) and len(at) == 2 and not self._is_deputy:
            with contextlib.suppress(KeyError, TypeError):
                self._network.connect(int(at[0]), at[1]["host"], at[1]["address"], at[1]["port"])
        if isinstance(leases := message.get("leases"), str):
            self._writer.set_leases(leases)
        if isinstance(phase := message.get("phase"), str):
            self._world_phase = phase
        if isinstance(text := message.get("failure"), str) and (seen := read_seen(text)) is not None:
            self._failed(seen)
        self._closing |= bool(message.get("closing"))
        if isinstance(rank := message.get("signalled"), int):
            self._signalled_at[rank] = time.monotonic()
        if message.get("reported"):
            self._reported, self._decide_at = True, math.inf
        if isinstance(code := message.get("end"), int):
            self._end_ranks(code)

    def _welcome(self, number: int) -> None:
        """Say what an agent that has come has to know."""
        if self._network is None:
            return
        if not self._is_hub:
            for seen in self._seen:
                if seen.host == self._host:
                    self._network.send(number, {"failure": pack_seen(seen)})
            return
        self._network.send(number, {"phase": self._world_phase})
        if self._deputy is None:
            # known by its answer
            self._deputy = number, {}
            self._network.send(number, {"deputy": True, "leases": self._leases})
        elif self._deputy[1]:
            self._network.send(number, {"deputy_at": list(self._deputy)})

    def _become_deputy(self) -> None:
        if self._network is None or self._is_deputy:
            return
        self._is_deputy = True
        address = self._network.address_of(HUB)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            listener = socket.create_server((address, 0), family=family, backlog=128)
            self._network.listen(listener)
            place = {"host": self._host, "address": address, "port": listener.getsockname()[1]}
            self._network.send(HUB, {"listens": place})

    def _lost_agent(self, number: int) -> None:
        if self._network is None or self._closing:
            return
        if self._is_hub:
            if self._deputy is not None and number == self._deputy[0]:
                self._deputy = None
                if rest := self._network.agents:
                    self._welcome(rest[0])
        elif number == HUB:
            # its successor will be there
            self._network.connect(HUB, self._meeting.host, self._meeting.address, self._meeting.agent_port)
            if self._is_deputy and self._rank_0_gone and not self._reported:
                self._decide_at = min(self._decide_at, time.monotonic() + _HUB_GONE_SECONDS)

    def _broadcast(self, message: dict[str, Any]) -> None:
        if self._network is not None:
            self._network.broadcast(message)

    def _close_world(self) -> None:
        """Rank 0 has left in order, or was told to end: what others do from here on is no failure."""
        self._closing = True
        self._broadcast({"closing": True})

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self._reported:
            self._end_world(self._end_code)
        elif self._seen:
            self._report_seen()
        elif self._gone:
            self._report_gone()

    def _report_seen(self) -> None:
        """Report what was seen since the verdict, as rank 0 has not."""
        report = describe_seen(sorted_seen(self._seen), self._world_phase)
        self._reported = True
        self._broadcast({"reported": True})
        # what the hub may have written before it was lost stands in etcd
        written = self._writer.publish(report, self._meeting, None, first_in_etcd=self._is_deputy)
        written.wait()
        self._end_world(report.failure.exit_code)

    def _end_world(self, code: int) -> None:
        self._broadcast({"end": code})
        self._end_ranks(code)

    def _report_gone(self) -> None:
        """Report what has gone before the verdict, unless they all have at once, or another one has got a signal just then: the launcher ends
        them all."""
        first = self._gone[0]
        is_ended = self._reported_at < first.heard + _SAME_SECONDS
        if not is_ended and (len(self._gone) == 1 or self._ranks):
            self._end_with(first, death(self._host), Cause.DEATH)

    def _look(self, now: float) -> None:
        if self._network is not None:
            self._network.tick()
        if now > self._kill_at:
            self._kill_at = math.inf
            for local in self._ranks:
                local.kill()
        if self._stop_at < math.inf:
            return
        waiting = [local for local in self._ranks if not (local.preflight_done or local.detached)]
        if waiting and now - self._began > self._limits.world_seconds:
            self._late(waiting)
            return
        for local in self._ranks:
            patience = self._meeting.patience(local.phase)
            if patience is None or local.detached or local.is_watched_elsewhere:
                continue
            if now - local.asked > min(self._meeting.period, patience / 4):
                local.asked = now
                local.send("ping")
            if now - local.heard > patience:
                self._silent(local, now)
                return

    def _silent(self, local: LocalRank, now: float) -> None:
        if local.rank == 0:
            self._writer.revoke()
        self._reported = True
        self._broadcast({"reported": True})
        self._end_with(local, silence(now - local.heard, self._host), Cause.SILENCE)
        self._broadcast({"end": self._end_code})
        # the others miss it a little later, and end it with themselves; the launcher knows the better exit code
        others = self._launch.size != 1 and local.preflight_done
        self._kill_at = now + _STUCK_SECONDS + (1.5 * self._meeting.period if others else 0.0)
        self._stop_at = max(self._stop_at, self._kill_at + 2 * _TICK_SECONDS)

    def _late(self, ranks: Sequence[LocalRank]) -> None:
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
        text = f"{error}\n{describe_missing_ranks(ranks, self._launch)}"
        failure = Failure(ranks[0].rank, int(error.exit_code), text, Cause.SILENCE, ranks[0].phase, time.monotonic())
        report = describe_seen([Seen(failure, self._host)], failure.phase)
        self._writer.publish(report, self._meeting, None, for_node=True).wait()
        self._end_ranks(failure.exit_code)

    def _end_with(self, local: LocalRank, error: BootstrapError, cause: Cause) -> None:
        phase = self._world_phase if local.rank == 0 and self._world_phase else local.phase
        failure = Failure(local.rank, int(error.exit_code), str(error), cause, phase, time.monotonic())
        self._end_code = failure.exit_code
        self._writer.publish(describe_seen([Seen(failure, self._host)], phase), self._meeting, None).wait()
        self._end_ranks(failure.exit_code)

    def _end_ranks(self, code: int) -> None:
        now = time.monotonic()
        self._stop_at = min(self._stop_at, now + _END_SECONDS)
        self._kill_at = min(self._kill_at, now + _STUCK_SECONDS)
        for local in self._ranks:
            local.send(f"end {code}")


def run_node_agent(
    listener: int | None, first: int, launch: Launch, host: str, argv: Sequence[str], environ: Mapping[str, str]
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
    set_title(f"dynamo_mpi: node agent on {host}")
    agent.run()
