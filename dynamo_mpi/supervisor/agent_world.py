# SPDX-License-Identifier: Apache-2.0
"""A node agent's state of the whole world: collects failures, decides which agent reports them, and ends all ranks.

Rank 0's agent, the hub, receives each failure and decides. Rank 0 has 2 s to report by itself. If rank 0 is gone, or Slurm is about to kill
the agents too, the hub reports after all other agents have sent the failures that they observed, because a consequence may be observed before
its cause. If the hub is gone too, the deputy reports, unless a record in etcd shows that the hub did.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.failure import DetectedBy
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_failures import (
    History,
    ObservedFailure,
    Report,
    compose_report,
    decode_observed,
    encode_observed,
    explain_signal,
    first_of_each_rank,
    lacks_cause,
    lost_hub,
    settle_seconds,
    with_gpu_errors,
    with_lost_agents,
)
from dynamo_mpi.supervisor.agent_peers import HUB, AgentPeers
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable

    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.supervisor.agent_writer import PendingReport, ReportWriter
    from dynamo_mpi.supervisor.local_rank import LocalRanks

# rank 0, if alive, reports by itself and knows more than its agent
_RANK0_REPORT_SECONDS = 2.0
# how long the deputy waits for the hub's report; a hub that exited together with rank 0 is not replaced
_HUB_REPORT_SECONDS = 1.5
_HUB_GONE_SECONDS = 0.05
_SUCCESSOR_SECONDS = 1.0
# an agent whose ranks have died stays until the cause is reported
_CAUSE_SECONDS = 3.0
_NOT_JOINED_SECONDS = 1.0
_LAUNCHER_SECONDS = 0.25
_PRINT_SECONDS = 0.15


class WorldWatch:
    """An agent's state of the whole world. Everything runs in the agent's thread.

    Args:
        selector: the agent's selector.
        launch: how the ranks of this node were started.
        local_ranks: the ranks of this node.
        writer: writes reports and revokes leases.
        rendezvous: the settings until rank 0 sends its own.

    Attributes:
        rendezvous: names the directories for reports and the heartbeat timeouts.
        history: the world's phases and signals.
        decide_at: when `decide` is due, in seconds of the monotonic clock.
        reported: a report is written or being written.
        closing: rank 0 shut down in order, or a launcher was asked to end the ranks: from then on an exit is not a failure.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        launch: LaunchInfo,
        local_ranks: LocalRanks,
        writer: ReportWriter,
        rendezvous: Rendezvous,
    ) -> None:
        self._launch, self._local_ranks, self._writer, self._host = launch, local_ranks, writer, local_ranks.host
        self.rendezvous, self.history = rendezvous, History(launch.size)
        self.decide_at = self._keep_until = math.inf
        self.reported = self.closing = self._rank0_lost = self._awaits_agent = False
        self._peers = AgentPeers(selector, self._host, self)
        self._observed, self._end_code = list[ObservedFailure](), int(ExitCode.ENGINE)
        # agents that have not answered yet, and agents that wait for our answer
        self._unanswered, self._answer_to = set[int](), list[int]()
        self._pending_report: PendingReport | None = None
        self._hub_lost_at, self._print_until, self._is_in_step = 0.0, 0.0, launch.launcher is Launcher.SLURM_PMIX

    @property
    def has_network(self) -> bool:
        """Whether this agent is, or will be, connected to other agents."""
        return self._peers.exist

    @property
    def is_waiting(self) -> bool:
        """Whether an agent without ranks must stay: a decision is due, or the cause of their exit isn't reported yet."""
        now = time.monotonic()
        is_due = self.decide_at < math.inf and not (self.reported and not self._peers.exist)
        settled = self.closing or self.reported or not self._peers.exist or not self._observed
        return is_due or now < self._print_until or (not settled and now < self._keep_until)

    # -- messages of this node's ranks ---------------------------------------------------------------------------------

    def set_listener(self, listener: socket.socket) -> None:
        """Accept the agents of other nodes on this socket."""
        self._peers.listen(listener)

    def connect_agents(self, rank: int, text: str) -> None:
        """Connect to the other agents as soon as MPI runs; ``text`` is what `agent_socket.connect_agents` sends."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(text)
            self._peers.is_hub |= rank == 0
            self._peers.join(rank, content["token"], content["host"], content["addresses"], int(content["port"]))

    def join(self, rank: int, text: str) -> None:
        """Apply what rank 0 sent with the preflight result; ``text`` is the result of `Rendezvous.as_json`."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self.rendezvous = sent = Rendezvous(**json.loads(text)["rendezvous"])
            self._peers.is_hub |= rank == 0
            if sent.agent_port:
                self._peers.join(rank, sent.agent_token, sent.host, [sent.address], sent.agent_port)

    def set_phase(self, phase: str) -> None:
        """Record rank 0's phase and send it to the other agents."""
        self.history.note_phase(phase)
        self._peers.broadcast({"phase": phase})

    def set_leases(self, encoded: str) -> None:
        """Set the leases that the worker owns in etcd, here and in the deputy."""
        self._writer.set_leases(encoded)
        self._peers.set_leases(encoded)

    def note_signal(self, rank: int) -> None:
        """Record that a rank got a signal to end."""
        self.history.note_signal(rank)
        self._peers.broadcast({"signalled": rank})

    def note_gpu_error(self, document: dict[str, Any]) -> None:
        """Record an Xid of this node that `GpuError.as_document` has encoded just now, and send it to the other agents."""
        self.history.note_gpu_error(document)
        self._peers.broadcast({"gpu_error": document})

    def publish(self, report: Report, on_logged: Callable[[], object]) -> None:
        """Write rank 0's report unless one is written already; then call ``on_logged``."""
        if self.reported:
            on_logged()
            return
        self._write(explain_signal(report, self._observed, self.history.phase), 0, on_logged)

    def report(self, report: Report, *, for_node: bool = False) -> None:
        """Write a report of this agent and wait until it is written, at most 2 s."""
        self._write(report, None, for_node=for_node).wait()
        self.answer()

    def _write(
        self, report: Report, by: int | None, on_logged: Callable[[], object] = lambda: None, *, for_node: bool = False
    ) -> PendingReport:
        self.reported, self.decide_at, self._end_code = True, math.inf, report.failure.exit_code
        # the lost hub, or a deputy before a new hub, may have written a report: then etcd has it
        is_alone = self._peers.exist and not self._peers.agents
        only_if_first = by is None and (self._peers.is_deputy or is_alone)
        report = with_gpu_errors(report, self.history.gpu_errors)
        self._pending_report = self._writer.publish(
            report, self.rendezvous, by, on_logged, self._peers.wake, for_node=for_node, only_if_first=only_if_first
        )
        return self._pending_report

    def set_reported(self, end_code: int | None = None) -> None:
        """Record that a rank of this node has written a report by itself; with a code, end all ranks as soon as another agent knows it."""
        self._peers.broadcast({"reported": True})
        if not self.reported:  # else the end of all may be due
            self.reported, self.decide_at = True, math.inf
        if end_code is not None:
            self._end_code, self._awaits_agent = end_code, self._peers.exist and not self._peers.agents
            self.decide_at = time.monotonic() + (_NOT_JOINED_SECONDS if self._awaits_agent else 0.0)

    def end_all(self, code: int) -> None:
        """End the ranks of all nodes."""
        self._end_code = code
        self._peers.broadcast({"end": code})
        self._local_ranks.end(code)

    def on_rank0_exit(self, *, in_order: bool) -> None:
        """Handle the exit of rank 0, which runs on this node."""
        if in_order:
            self._writer.clear_leases()
            self.close_world()
            return
        # if rank 0 fails, the whole worker is gone
        self._writer.revoke()
        self._rank0_lost = True
        # rank 0 may have exited before it could end the others; another node may know the cause
        self._decide_soon()

    def close_world(self) -> None:
        """From now on, treat no exit of a rank as a failure."""
        if not self._observed:
            self.closing = True
            self._peers.broadcast({"closing": True})

    def on_rank0_lost(self, observed: ObservedFailure) -> None:
        """Handle the report of a local rank that has lost rank 0."""
        if not self._peers.is_hub:
            self.on_failure(observed)

    def on_failure(self, observed: ObservedFailure) -> None:
        """Handle a failure of a rank of any node."""
        if self.reported or self.closing:
            return
        self._observed.append(observed)
        self._writer.revoke()
        now = time.monotonic()
        self._keep_until = now + (_CAUSE_SECONDS if self._peers.agents else _NOT_JOINED_SECONDS)
        self._rank0_lost |= observed.failure.rank == 0 and observed.failure.cause is not DetectedBy.REPORT
        if not self._peers.is_hub and self._peers.exist:
            # to all, so that the deputy gets it too
            if observed.host == self._host:
                self._peers.broadcast({"failure": encode_observed(observed)})
            if self._peers.is_deputy:
                self._decide_for_hub()
            return
        self._peers.send_to_deputy({"failure": encode_observed(observed)})
        is_death = observed.failure.cause is DetectedBy.DISCONNECT
        # a rank 0 in a step may be killed before it reports; and none knows of ranks that are still in the preflight
        is_ours = self._rank0_lost or observed.failure.phase == "preflight" or (is_death and self._is_in_step)
        if self._launch.launcher is Launcher.HYDRA and is_death:
            # mpiexec kills all other ranks at once, and with them the connection to its output
            self.decide_at = now
        elif self._local_ranks.rank0_reports() and not is_ours:
            self.decide_at = min(self.decide_at, now + _RANK0_REPORT_SECONDS)
        else:
            self._decide_soon()

    # -- called by the agent's loop ------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Report the observed failures; if they are reported already, end the remaining ranks."""
        self.decide_at = math.inf
        if self.reported:
            self.end_all(self._end_code)
        elif self._observed:
            if self._peers.is_deputy and not self._rank0_lost:
                if self._peers.has_hub:
                    return
                self._observed.append(lost_hub(self._peers.hub_host, self.history.phase, self._hub_lost_at))
            lost = [agent for agent in self._peers.lost if self.history.phase_at(agent.at) != "exit"]
            observed = with_lost_agents(first_of_each_rank(self._observed), lost, self.history.signalled)
            # before the preflight result each rank has a phase of its own
            phase = self.history.phase_at(observed[0].failure.at) if self.rendezvous.token else ""
            self.report(report := compose_report(observed, phase))
            # a launcher that noticed a death ends the others by itself, with the better exit code
            is_noticed = report.failure.cause is DetectedBy.DISCONNECT
            self.decide_at = time.monotonic() + (_LAUNCHER_SECONDS if is_noticed else 0.0)

    def answer(self) -> None:
        """Answer the agents that asked: all failures that this agent observed have been sent before."""
        # not sooner: MPICH's mpiexec ends no rank of other hosts while the agent of the dead rank's host runs
        if self._pending_report is not None and self._pending_report.is_done:
            self._pending_report = None
            self._wait_for_printing()
            self._peers.broadcast({"reported": True})
        while self._answer_to:
            self._peers.send(self._answer_to.pop(0), {"answer": True})

    def tick(self) -> None:
        """Do the periodic work."""
        self._peers.tick()

    def close(self) -> None:
        """Close all connections."""
        self._peers.close()

    def _wait_for_printing(self) -> None:
        """Give MPICH's mpiexec time to print the report: it ends its proxies when the dead rank's outputs are closed."""
        if self._launch.launcher is Launcher.HYDRA:
            self._print_until = time.monotonic() + _PRINT_SECONDS

    def _decide_soon(self) -> None:
        agents = self._peers.agents
        delay = settle_seconds(self._observed, self._is_in_step, self._peers.exist, bool(agents))
        self.decide_at = min(self.decide_at, time.monotonic() + delay)
        if not self._unanswered:
            self._unanswered = set(agents)
            self._peers.broadcast({"ask": True})

    def _decide_for_hub(self) -> None:
        """Schedule a decision in place of the hub, if the hub is lost together with rank 0 or its successor doesn't join."""
        if self._peers.has_hub and not self._rank0_lost:
            return
        gone = _HUB_GONE_SECONDS if self._rank0_lost else _SUCCESSOR_SECONDS
        delay = _HUB_REPORT_SECONDS if self._peers.has_hub else gone
        self.decide_at = min(self.decide_at, time.monotonic() + delay)

    # -- the other agents, see `PeerEvents` -----------------------------------------------------------------------------

    def on_message(self, number: int, message: dict[str, Any]) -> None:
        """Handle a message of another agent; agents of other versions may send other keys, so each key is checked."""
        if isinstance(leases := message.get("leases"), str):
            self._writer.set_leases(leases)
        if isinstance(phase := message.get("phase"), str):
            self.history.note_phase(phase)
        if isinstance(text := message.get("failure"), str) and (observed := decode_observed(text)) is not None:
            self.on_failure(observed)
        self.closing |= bool(message.get("closing"))
        if message.get("ask"):
            self._answer_to.append(number)
        if message.get("answer"):
            self._unanswered.discard(number)
            # else a cause may follow: other ranks may lose a rank before its own agent sees it end
            if not self._unanswered and self.decide_at < math.inf and not lacks_cause(self._observed):
                self.decide_at = time.monotonic()
        if isinstance(rank := message.get("signalled"), int):
            self.history.note_signal(rank)
        if message.get("reported"):
            if not self.reported:
                self.reported, self.decide_at = True, math.inf
            self._wait_for_printing()
        if "gpu_error" in message:
            self.history.note_gpu_error(message["gpu_error"])
        if isinstance(code := message.get("end"), int):
            self._local_ranks.end(code)

    def greet(self, number: int) -> None:
        """Send an agent that has joined what it must know."""
        if self.reported and self._pending_report is None:
            self._peers.send(number, {"reported": True})
            if self._awaits_agent:
                self.decide_at = time.monotonic()
        if self._peers.is_hub:
            self._peers.send(number, {"phase": self.history.phase})
            return
        for observed in (each for each in self._observed if each.host == self._host):
            self._peers.send(number, {"failure": encode_observed(observed)})

    def on_peer_lost(self, number: int) -> bool:
        """Handle the loss of the connection to an agent; return whether it must be replaced."""
        self._unanswered.discard(number)
        if not (self._peers.is_hub or self.closing) and number == HUB:
            self._hub_lost_at = time.monotonic()
            if self._peers.is_deputy and self._observed and not self.reported:
                self._decide_for_hub()
        return not self.closing
