# SPDX-License-Identifier: Apache-2.0
"""A node agent's part in the watch over a whole world: which failures are known, who reports them, and the end of all ranks.

Rank 0's agent, the hub, hears of each failure and decides. Rank 0 has two seconds to report by itself; where it has gone, the hub reports
once all other agents have sent what they have seen, since what follows from a death may be seen sooner than the death. The deputy reports
where the hub has gone, too, and what stands in etcd keeps it from doing so again.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_failures import Report, Seen, describe_seen, pack_seen, read_seen, sorted_seen
from dynamo_mpi.supervisor.agent_history import History
from dynamo_mpi.supervisor.agent_network import HUB, AgentNetwork
from dynamo_mpi.supervisor.failure_messages import host_lost
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Sequence

    from dynamo_mpi.mpi.launcher import LaunchInfo
    from dynamo_mpi.supervisor.agent_writer import ReportWriter, Written

# for the other agents' answers, and where none has joined yet
_SETTLE_SECONDS = 0.4
_JOIN_SECONDS = 0.3
# ranks of one node: what is there to be read is read in the order in which it happened
_ROUND_SECONDS = 0.02
# a rank 0 that lives reports by itself, with what it knows beyond what is seen here
_RANK_0_SECONDS = 2.0
# the deputy leaves it to the hub for so long; a hub that has ended together with rank 0 is not replaced
_HUB_SECONDS = 1.5
_HUB_GONE_SECONDS = 0.05
_SUCCESSOR_SECONDS = 1.0
# an agent whose ranks have died waits until the cause is reported
_LINGER_SECONDS = 3.0
_NOT_JOINED_SECONDS = 1.0
_LAUNCHER_SECONDS = 0.25
_FLUSH_SECONDS = 0.5
_HOLD_SECONDS = 0.15


class WorldWatch:
    """What an agent knows of its world. All of it runs in the agent's thread.

    Args:
        selector: the agent's.
        launch: how the ranks of this node were started.
        host: this node.
        writer: writes reports, and revokes leases.
        meeting: what holds until rank 0 has said more.
        end_ranks: ends the ranks of this node with an exit code.
        rank_0_reports: returns whether rank 0 is on this node, lives, and watches over the others.

    Attributes:
        meeting: names the folders for reports, and says how long a rank may be silent.
        history: the world's phases, and signals.
        decide_at: when `decide` is due, in seconds of the monotonic clock.
        reported: a report is written, or is being written.
        closing: rank 0 has left in order, or a launcher was asked to end the ranks: from then on no end is a failure.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        launch: LaunchInfo,
        host: str,
        writer: ReportWriter,
        meeting: Rendezvous,
        end_ranks: Callable[[int], None],
        rank_0_reports: Callable[[], bool],
    ) -> None:
        self._selector, self._launch, self._host, self._writer = selector, launch, host, writer
        self._end_ranks, self._rank_0_reports = end_ranks, rank_0_reports
        self.meeting = meeting
        self.history = History(launch.size)
        self.decide_at = self._stay_until = math.inf
        self.reported = self.closing = False
        self._network: AgentNetwork | None = None
        self._listener: socket.socket | None = None
        self._hub_place: tuple[str, Sequence[str], int] = "", (), 0
        self._is_hub = self._is_deputy = self._rank_0_gone = False
        self._deputy: tuple[int, dict[str, Any]] | None = None
        self._leases = ""
        self._seen: list[Seen] = []
        self._end_code = int(ExitCode.ENGINE)
        # agents whose answer is due, and those to which one is due
        self._unanswered: set[int] = set()
        self._askers: list[int] = []
        self._written: Written | None = None
        self._hub_lost_at = self._hold_until = 0.0
        self._deputy_place: dict[str, Any] = {}

    @property
    def is_joined(self) -> bool:
        """Whether other agents are, or will be, heard."""
        return self._network is not None

    @property
    def is_waiting(self) -> bool:
        """Whether an agent without ranks is needed: there is something to decide, or the cause of their end isn't reported yet."""
        if time.monotonic() < self._hold_until:
            return True
        if self.decide_at < math.inf and not (self.reported and self._network is None):
            return True
        settled = self.closing or self.reported or self._network is None or not self._seen
        return not settled and time.monotonic() < self._stay_until

    # -- what the ranks of this node say -------------------------------------------------------------------------------

    def take_listener(self, listener: socket.socket) -> None:
        """Hear the agents of other nodes at this socket."""
        self._listener = listener
        if self._network is not None:
            self._network.listen(listener)

    def join_early(self, rank: int, text: str) -> None:
        """Meet the other agents, as soon as MPI runs; ``text`` is what `agent_invitation` has made."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(text)
            self._is_hub |= rank == 0
            self._join(rank, content["token"], content["host"], content["addresses"], int(content["port"]))

    def join(self, rank: int, text: str) -> None:
        """Go by what rank 0 has said with the verdict; ``text`` is what `Rendezvous.as_json` has made."""
        try:
            self.meeting = meeting = Rendezvous(**json.loads(text)["meeting"])
        except (ValueError, KeyError, TypeError):
            return
        self._is_hub |= rank == 0
        if meeting.agent_port:
            self._join(rank, meeting.agent_token, meeting.host, [meeting.address], meeting.agent_port)

    def set_phase(self, phase: str) -> None:
        """Take note of rank 0's phase."""
        self.history.note_phase(phase)
        self._broadcast({"phase": phase})

    def set_leases(self, encoded: str) -> None:
        """Take note of what the worker has in etcd."""
        self._leases = encoded
        self._writer.set_leases(encoded)
        if self._deputy is not None:
            self._send(self._deputy[0], {"leases": encoded})

    def note_signal(self, rank: int) -> None:
        """A rank was asked to end."""
        self.history.note_signal(rank)
        self._broadcast({"signalled": rank})

    def publish(self, report: Report, then: Callable[[], object]) -> None:
        """Write the report that rank 0 has composed, unless one is written already, and call ``then``."""
        if self.reported:
            then()
            return
        self._write(report, 0, then)

    def report(self, report: Report, *, for_node: bool = False) -> None:
        """Write a report of this agent's own, and wait for it, two seconds at the most."""
        self._write(report, None, for_node=for_node).wait()
        self.answer()

    def _write(
        self, report: Report, by: int | None, then: Callable[[], object] = lambda: None, *, for_node: bool = False
    ) -> Written:
        self.reported, self.decide_at, self._end_code = True, math.inf, report.failure.exit_code
        # a hub that was lost may have written it, or a deputy before a hub's successor: then it stands in etcd
        is_lonely = self._network is not None and not self._network.agents
        first_in_etcd = by is None and (self._is_deputy or is_lonely)
        wake = (lambda: None) if self._network is None else self._network.wake
        self._written = self._writer.publish(
            report, self.meeting, by, then, wake, for_node=for_node, first_in_etcd=first_in_etcd
        )
        return self._written

    def set_reported(self) -> None:
        """Take note that a rank of this node has reported by itself."""
        self.reported, self.decide_at = True, math.inf
        self._broadcast({"reported": True})

    def end_all(self, code: int) -> None:
        """End the ranks of all nodes."""
        self._end_code = code
        self._broadcast({"end": code})
        self._end_ranks(code)

    def rank_0_left(self, *, in_order: bool) -> None:
        """Rank 0, which is of this node, has ended."""
        if in_order:
            self._writer.clear_leases()
            self.close_world()
            return
        # a rank 0 that doesn't leave in order takes the whole worker along
        self._writer.revoke()
        self._rank_0_gone = True
        # ended before it could end the others, maybe; where no failure is known yet, another node may know of one
        self._decide_soon()

    def close_world(self) -> None:
        """No end of a rank is a failure from here on."""
        if not self._seen:
            self.closing = True
            self._broadcast({"closing": True})

    def lost_rank_0(self, seen: Seen) -> None:
        """A rank of this node can't reach rank 0 any more."""
        if self._is_hub:
            return
        self.failed(seen)

    def failed(self, seen: Seen) -> None:
        """A rank has failed, of this node or of another."""
        if self.reported or self.closing:
            return
        self._seen.append(seen)
        self._writer.revoke()
        now = time.monotonic()
        is_joined = self._network is not None and self._network.agents
        self._stay_until = now + (_LINGER_SECONDS if is_joined else _NOT_JOINED_SECONDS)
        self._rank_0_gone |= seen.failure.rank == 0 and seen.failure.cause is not DetectedBy.REPORT
        if not self._is_hub and self._network is not None:
            # also to the deputy
            if seen.host == self._host:
                self._network.broadcast({"failure": pack_seen(seen)})
            if self._is_deputy:
                self._decide_for_hub()
            return
        if self._deputy is not None:
            self._send(self._deputy[0], {"failure": pack_seen(seen)})
        if self._launch.launcher is Launcher.HYDRA and seen.failure.cause is DetectedBy.DISCONNECT:
            # mpiexec kills all others at once, and the way to its output with them
            self.decide_at = now
        elif self._rank_0_reports() and not self._rank_0_gone:
            self.decide_at = min(self.decide_at, now + _RANK_0_SECONDS)
        else:
            self._decide_soon()

    # -- what the agent does now and then ------------------------------------------------------------------------------

    def decide(self) -> None:
        """Report what was seen, or end what is left of a world that is reported."""
        self.decide_at = math.inf
        if self.reported:
            self.end_all(self._end_code)
        elif self._seen:
            if self._is_deputy and not self._rank_0_gone:
                if self._has_hub:
                    return
                # what has become of rank 0's node is not known here, but that its agent was the first to go
                error = host_lost(self.meeting.host)
                lost = Failure(
                    0,
                    int(error.exit_code),
                    str(error),
                    DetectedBy.HOST_UNREACHABLE,
                    self.history.phase,
                    self._hub_lost_at,
                )
                self._seen.append(Seen(lost, self.meeting.host))
            seen = sorted_seen(self._seen)
            # before the verdict each rank has a phase of its own
            report = describe_seen(seen, self.history.phase_at(seen[0].failure.at) if self.meeting.token else "")
            self.report(report)
            # a launcher that has seen the death ends the others by itself, with the better exit code
            patience = _LAUNCHER_SECONDS if report.failure.cause is DetectedBy.DISCONNECT else 0.0
            self.decide_at = time.monotonic() + patience

    def answer(self) -> None:
        """Tell the agents that ask that they have heard all: what this one has seen was sent before."""
        # not sooner: MPICH's mpiexec ends nothing on other hosts as long as an agent of the dead rank's host stays
        if self._written is not None and self._written.is_done:
            self._written = None
            self._hold()
            self._broadcast({"reported": True})
        askers, self._askers = self._askers, []
        for number in askers:
            self._send(number, {"answer": True})

    def tick(self) -> None:
        """Do what is due now and then."""
        if self._network is not None:
            self._network.tick()

    def close(self) -> None:
        """End all connections."""
        if self._network is not None:
            self._network.flush(_FLUSH_SECONDS)
            self._network.close()

    def _hold(self) -> None:
        """Give MPICH's mpiexec time to print the report: it ends its proxies once the dead rank's outputs are closed."""
        if self._launch.launcher is Launcher.HYDRA:
            self._hold_until = time.monotonic() + _HOLD_SECONDS

    def _decide_soon(self) -> None:
        agents = [] if self._network is None else self._network.agents
        patience = _ROUND_SECONDS if self._network is None else _SETTLE_SECONDS if agents else _JOIN_SECONDS
        self.decide_at = min(self.decide_at, time.monotonic() + patience)
        if not self._unanswered:
            self._unanswered = set(agents)
            self._broadcast({"ask": True})

    @property
    def _has_hub(self) -> bool:
        return self._network is not None and HUB in self._network.agents

    def _decide_for_hub(self) -> None:
        """Decide in the hub's place, if that doesn't: where it has gone, and rank 0 with it, or its successor doesn't come."""
        if self._has_hub and not self._rank_0_gone:
            return
        patience = _HUB_SECONDS if self._has_hub else _HUB_GONE_SECONDS if self._rank_0_gone else _SUCCESSOR_SECONDS
        self.decide_at = min(self.decide_at, time.monotonic() + patience)

    # -- the other agents ----------------------------------------------------------------------------------------------

    def _join(self, node: int, token: str, host: str, addresses: Sequence[str], port: int) -> None:
        before, self._hub_place = self._hub_place, (host, addresses, port)
        if self._network is not None:
            if not (self._is_hub or self._has_hub) and before != self._hub_place:
                self._connect_to_hub()
            return
        self._network = AgentNetwork(self._selector, node, token, self._heard, self._lost)
        if not self._is_hub:
            self._connect_to_hub()
        elif self._listener is not None:
            self._network.listen(self._listener)

    def _connect_to_hub(self) -> None:
        if self._network is not None:
            self._network.connect(HUB, *self._hub_place)

    def _send(self, number: int, message: dict[str, Any]) -> None:
        if self._network is not None:
            self._network.send(number, message)

    def _broadcast(self, message: dict[str, Any]) -> None:
        if self._network is not None:
            self._network.broadcast(message)

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        """Take a message; one of another version may lack what this one expects, so nothing is taken for granted."""
        if message.get("joined"):
            self._welcome(number)
        if message.get("deputy"):
            self._become_deputy()
        elif "deputy" in message:
            self._is_deputy = False
        if isinstance(place := message.get("listens"), dict):
            if self._deputy is not None and self._deputy[0] != number:
                # a successor of the hub may have asked another one before the deputy came
                self._send(self._deputy[0], {"deputy": False})
            self._deputy = number, place
            self._send(number, {"leases": self._leases})
            for other in () if self._network is None else self._network.agents:
                if other != number:
                    self._send(other, {"deputy_at": [number, place]})
        if isinstance(at := message.get("deputy_at"), list) and len(at) == 2 and not self._is_deputy:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                if self._network is not None:
                    self._network.connect(int(at[0]), at[1]["host"], [at[1]["address"]], at[1]["port"])
        if isinstance(leases := message.get("leases"), str):
            self._writer.set_leases(leases)
        if isinstance(phase := message.get("phase"), str):
            self.history.note_phase(phase)
        if isinstance(text := message.get("failure"), str) and (seen := read_seen(text)) is not None:
            self.failed(seen)
        self._heard_of_end(number, message)

    def _heard_of_end(self, number: int, message: dict[str, Any]) -> None:
        self.closing |= bool(message.get("closing"))
        if message.get("ask"):
            self._askers.append(number)
        if message.get("answer"):
            self._unanswered.discard(number)
            if not self._unanswered and self.decide_at < math.inf:
                self.decide_at = time.monotonic()
        if isinstance(rank := message.get("signalled"), int):
            self.history.note_signal(rank)
        if message.get("reported"):
            self.reported, self.decide_at = True, math.inf
            self._hold()
        if isinstance(code := message.get("end"), int):
            self._end_ranks(code)

    def _welcome(self, number: int) -> None:
        """Say what an agent that has come has to know."""
        if not self._is_hub:
            if self._is_deputy and number == HUB:
                self._send(HUB, {"listens": self._deputy_place})
            for seen in self._seen:
                if seen.host == self._host:
                    self._send(number, {"failure": pack_seen(seen)})
            return
        self._send(number, {"phase": self.history.phase})
        if self._deputy is None:
            # known by its answer
            self._deputy = number, {}
            self._send(number, {"deputy": True, "leases": self._leases})
        elif self._deputy[1]:
            self._send(number, {"deputy_at": list(self._deputy)})

    def _become_deputy(self) -> None:
        if self._network is None:
            return
        if self._is_deputy:
            # the hub's successor doesn't know it
            self._send(HUB, {"listens": self._deputy_place})
            return
        self._is_deputy = True
        address = self._network.address_of(HUB)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            listener = socket.create_server((address, 0), family=family, backlog=128)
            self._network.listen(listener)
            self._deputy_place = {"host": self._host, "address": address, "port": listener.getsockname()[1]}
            self._send(HUB, {"listens": self._deputy_place})

    def _lost(self, number: int) -> None:
        """The connection to an agent has ended."""
        self._unanswered.discard(number)
        if self._network is None or self.closing:
            return
        if self._is_hub:
            if self._deputy is not None and number == self._deputy[0]:
                self._deputy = None
                if rest := self._network.agents:
                    self._welcome(rest[0])
        elif number == HUB:
            # its successor will be there
            self._connect_to_hub()
            self._hub_lost_at = time.monotonic()
            if self._is_deputy and self._seen and not self.reported:
                self._decide_for_hub()
