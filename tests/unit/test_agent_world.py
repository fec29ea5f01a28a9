# SPDX-License-Identifier: Apache-2.0
"""Which agent reports what: the hub, once all have reported what they know; the deputy, without the hub. Real connections on loopback."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import pytest

from dynamo_mpi.common.failure import ENDED_BY_MPI, DetectedBy, Failure
from dynamo_mpi.common.xids import GpuError
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, Report, explain_signal
from dynamo_mpi.supervisor.agent_world import WorldWatch
from dynamo_mpi.supervisor.agent_writer import PendingReport, ReportWriter
from dynamo_mpi.supervisor.local_rank import LocalRanks
from dynamo_mpi.supervisor.rendezvous import Rendezvous

TOKEN = "ab" * 32


class Notes:
    """Takes what a writer would write."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.leases = ""
        self.revoked = 0

    def set_leases(self, encoded: str) -> None:
        self.leases = encoded

    def clear_leases(self) -> None:
        self.leases = ""

    def revoke(self) -> None:
        self.revoked += 1

    def publish(
        self,
        report: Report,
        rendezvous: Rendezvous,
        by: int | None,
        then: Callable[[], object],
        done: Callable[[], object],
        **_: Any,
    ) -> PendingReport:
        self.reports.append(report)
        written = PendingReport()
        written.set()
        then()
        done()
        return written


class Agent:
    """An agent's part in the watch, in a loop that is turned by hand."""

    def __init__(self, rank: int, port: int, launcher: Launcher) -> None:
        self.rank, self.host, self.notes = rank, f"n{rank}", Notes()
        self.selector = selectors.DefaultSelector()
        self.ended: list[int] = []
        self.rank_0_lives = rank == 0
        self.watch = WorldWatch(
            self.selector,
            LaunchInfo(launcher, rank, 3, 0, 1),
            LocalRanks(self.host, self.ended.append, lambda: self.rank_0_lives),
            cast(ReportWriter, self.notes),
            Rendezvous(self.host),
        )
        self.rendezvous = Rendezvous("n0", "127.0.0.1", 1, TOKEN, has_agent=True, agent_port=port, agent_token=TOKEN)

    def join(self) -> None:
        self.watch.join(self.rank, self.rendezvous.as_json())

    def turn(self) -> None:
        for key, _ in self.selector.select(0.005):
            key.data()
        self.watch.answer()
        if time.monotonic() >= self.watch.decide_at:
            self.watch.decide()
        self.watch.tick()

    def dies(self, at: float = 0.0, text: str = "died") -> None:
        """Its own rank dies, or has died."""
        if self.rank == 0:
            self.rank_0_lives = False
            self.watch.on_rank0_exit(in_order=False)
        if not self.watch.history.was_ended_by_launcher(self.rank):
            self.watch.on_failure(ObservedFailure(death(self.rank, at, text), self.host))


def death(rank: int, at: float = 0.0, text: str = "died") -> Failure:
    return Failure(rank, 70, text, DetectedBy.DISCONNECT, "serve", time.monotonic() + at)


def turn_until(agents: list[Agent], condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        for agent in agents:
            agent.turn()


@contextmanager
def running_world(launcher: Launcher) -> Iterator[list[Agent]]:
    """Run a hub, its deputy and another agent, that all know of each other; their leases are the hub's."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        agents = [Agent(rank, listener.getsockname()[1], launcher) for rank in range(3)]
        hub, deputy, other = agents
        hub.watch.set_listener(listener.dup())
        for agent in agents:
            stack.callback(agent.watch.close)
            agent.join()
        hub.watch.set_leases(json.dumps({"leases": [1]}))
        turn_until(agents, lambda: deputy.notes.leases or other.notes.leases)
        if other.notes.leases:  # it came first
            agents[1], agents[2] = agents[2], agents[1]
        hub.watch.set_phase("serve")
        turn_until(agents, lambda: all(agent.watch.history.phase == "serve" for agent in agents))
        yield agents


@pytest.fixture
def world() -> Iterator[list[Agent]]:
    """A world under mpirun."""
    with running_world(Launcher.OPEN_MPI) as agents:
        yield agents


def reports(agents: list[Agent]) -> list[Report]:
    return [report for agent in agents for report in agent.notes.reports]


def test_the_hub_reports_the_death_that_came_first_and_ends_all(world: list[Agent]) -> None:
    hub, _, other = world
    # MPI has ended rank 0 because of it, and the hub sees that sooner
    hub.dies()
    other.dies(-1)  # on a busy machine the message takes some of it
    turn_until(world, lambda: all(agent.ended for agent in world))
    (report,) = reports(world)
    assert (report.failure.rank, report.host) == (other.rank, other.host)
    assert [seen.failure.rank for seen in report.consequences] == [0]
    assert all(agent.watch.reported for agent in world)
    assert all(agent.ended[0] == 70 for agent in world)
    assert hub.notes.revoked


def test_an_xid_of_another_node_is_in_the_hub_s_report(world: list[Agent]) -> None:
    hub, _, other = world
    error = GpuError(79, 3, "GPU-3", other.host, time.monotonic() - 2.0)
    other.watch.note_gpu_error(error.as_document(time.monotonic()))
    turn_until(world, lambda: hub.watch.history.gpu_errors)
    hub.watch.publish(
        Report(death(1, text="NCCL error"), "n1", "error in serve: NCCL error", (), 0, "n0"), lambda: None
    )
    (written,) = hub.notes.reports
    (found,) = written.gpu_errors
    assert found._replace(at=0.0) == error._replace(at=0.0)
    assert abs(found.at - error.at) < 1
    assert f"    {error} of {other.host}, 2." in written.text
    # what an agent of another version sends is no error
    other.watch.note_gpu_error({"xid": "?"})
    other.watch.set_phase("drain")
    turn_until(world, lambda: hub.watch.history.phase == "drain")
    assert len(hub.watch.history.gpu_errors) == 1


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_rank_that_died_with_its_agent_is_the_cause_where_open_mpi_ended_rank_0(
    world: list[Agent], is_replaced: bool
) -> None:
    hub, deputy, other = world
    other.watch.close()
    turn_until([hub, deputy], lambda: hub.watch._peers.lost)
    left = [hub, deputy]
    if is_replaced:
        # the rank lives, as it has started another
        left.append(Agent(other.rank, other.rendezvous.agent_port, Launcher.OPEN_MPI))
        left[-1].join()
        turn_until(left, lambda: not hub.watch._peers.lost)
    hub.dies(text=f"died: {ENDED_BY_MPI}")
    turn_until(left, lambda: reports(left))
    (report,) = reports(left)
    cause = hub if is_replaced else other
    assert (report.failure.rank, report.host, report.reporter) == (cause.rank, cause.host, cause.rank)
    assert ("error in serve: died together with its node agent" in report.text) == (not is_replaced)
    assert [seen.failure.rank for seen in report.consequences] == ([] if is_replaced else [0])
    left[-1].watch.close()


def test_a_rank_that_died_with_its_agent_is_the_cause_where_the_launcher_has_killed_rank_0(world: list[Agent]) -> None:
    """mpirun signals a rank 0 that is too busy to report in time, and then kills it: that is no death in a drain."""
    hub, deputy, other = world
    other.watch.close()
    turn_until([hub, deputy], lambda: hub.watch._peers.lost)
    hub.watch.note_signal(0)
    hub.dies()
    turn_until([hub, deputy], lambda: reports([hub, deputy]))
    (report,) = reports([hub, deputy])
    assert (report.failure.rank, report.host) == (other.rank, other.host)
    assert "died together with its node agent" in report.text


def test_a_rank_0_that_lives_reports_by_itself(world: list[Agent]) -> None:
    hub, deputy, other = world
    other.dies()
    turn_until(world, lambda: hub.notes.revoked)
    report = Report(death(other.rank), other.host, "error in serve: …", (), 0, "n0")
    taken: list[bool] = []
    hub.watch.publish(report, lambda: taken.append(True))
    turn_until(world, lambda: deputy.watch.reported and other.watch.reported)
    assert reports(world) == [report]
    hub.watch.publish(report, lambda: taken.append(True))
    assert (reports(world), len(taken)) == ([report], 2), "what is reported already is not reported again"


def test_a_death_of_which_rank_0_cannot_know_is_reported_without_it(world: list[Agent]) -> None:
    hub, _, other = world
    begin = time.monotonic()
    other.watch.on_failure(ObservedFailure(death(other.rank)._replace(phase="preflight"), other.host))
    turn_until(world, lambda: hub.watch.reported)
    assert time.monotonic() - begin < 1.5, "rank 0 would have two seconds"
    (report,) = reports(world)
    assert (report.failure.rank, report.host) == (other.rank, other.host)


def test_a_signal_to_rank_0_does_not_hide_the_death_that_the_agents_have_seen(world: list[Agent]) -> None:
    hub, _, other = world
    other.dies()
    turn_until(world, lambda: hub.notes.revoked)
    signal = Failure(0, 143, "stopped by SIGTERM", DetectedBy.SIGNAL, "load", time.monotonic())
    hub.watch.publish(Report(signal, "n0", "error in load: stopped by SIGTERM", (), 0, "n0"), lambda: None)
    (report,) = reports(world)
    assert (report.failure.rank, report.host, report.reporter) == (other.rank, other.host, other.rank)
    assert report.text.startswith("error in ")
    assert [seen.failure for seen in report.consequences] == [signal]
    alone = Report(signal, "n0", "error in load: stopped by SIGTERM", (), 0, "n0")
    assert explain_signal(alone, [], "load") is alone


def test_the_deputy_reports_where_rank_0_and_the_hub_have_gone(world: list[Agent]) -> None:
    hub, deputy, other = world
    hub.watch.close()
    deputy.watch.on_rank0_lost(ObservedFailure(death(0), "n0"))
    turn_until([deputy, other], lambda: deputy.ended and other.ended)
    (report,) = reports(world)
    assert (report.failure.rank, report.host) == (0, "n0")
    assert deputy.notes.reports == [report]


def test_the_deputy_takes_a_hub_that_does_not_come_back_for_the_cause(world: list[Agent]) -> None:
    hub, deputy, other = world
    hub.watch.close()
    turn_until([deputy, other], lambda: deputy.watch._hub_lost_at)
    other.dies()
    turn_until([deputy, other], lambda: deputy.ended)
    (report,) = reports(world)
    assert (report.failure.rank, report.failure.cause, report.host) == (0, DetectedBy.HOST_UNREACHABLE, "n0")
    assert [seen.failure.rank for seen in report.consequences] == [other.rank]


def test_before_the_result_too_the_deputy_names_the_host_of_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        hub, deputy = Agent(0, port, Launcher.OPEN_MPI), Agent(1, port, Launcher.OPEN_MPI)
        hub.watch.set_listener(listener.dup())
        for agent in (hub, deputy):
            endpoint = {"host": "n0", "addresses": ["127.0.0.1"], "port": port, "token": TOKEN}
            agent.watch.connect_agents(agent.rank, json.dumps(endpoint))
        turn_until([hub, deputy], lambda: deputy.watch._peers.is_deputy)
        hub.watch.close()
    turn_until([deputy], lambda: deputy.watch._hub_lost_at)
    deputy.dies()
    turn_until([deputy], lambda: deputy.ended)
    deputy.watch.close()
    (report,) = deputy.notes.reports
    assert {each.failure.rank: each.host for each in report.consequences} | {report.failure.rank: report.host} == {
        0: "n0",
        1: "n1",
    }


def test_what_a_launcher_ends_after_a_signal_to_all_is_no_failure(world: list[Agent]) -> None:
    hub, _, other = world
    for agent in world:
        agent.watch.note_signal(agent.rank)
    turn_until(world, lambda: hub.watch.history.was_ended_by_launcher(0))
    for agent in world:
        agent.dies()
    hub.watch.close_world()
    turn_until(world, lambda: other.watch.closing)
    assert reports(world) == []


def test_a_death_in_a_drain_is_one(world: list[Agent]) -> None:
    hub, _, other = world
    hub.watch.note_signal(0)
    other.dies()
    turn_until(world, lambda: hub.notes.revoked)
    hub.dies()
    turn_until(world, lambda: reports(world))
    assert reports(world)[0].failure.rank == other.rank


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_reports_by_itself_is_known_to_the_other_agents_before_all_end(failing: int) -> None:
    """Before the preflight result: agents that join later must not report the ranks that MPI_Abort takes with it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        agents = [Agent(rank, listener.getsockname()[1], Launcher.HYDRA) for rank in range(2)]
        agents[0].watch.set_listener(listener.dup())
        for agent in agents:
            stack.callback(agent.watch.close)
            if agent.rank == failing:
                agent.join()
        agents[failing].watch.set_reported(70)
        agents[failing].turn()
        assert agents[failing].ended == []
        agents[1 - failing].join()
        turn_until(agents, lambda: all(agent.ended == [70] for agent in agents))
        assert agents[1 - failing].watch.reported
        agents[1 - failing].dies()
        for _ in range(5):
            agents[1 - failing].turn()
        assert reports(agents) == []


def test_a_rank_that_reports_by_itself_does_not_wait_long_for_other_agents() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        alone = Agent(0, listener.getsockname()[1], Launcher.HYDRA)
        stack.callback(alone.watch.close)
        alone.join()
        alone.watch.set_reported(70)
        turn_until([alone], lambda: alone.ended == [70], 2.0)


def test_under_mpich_the_hub_does_not_wait_for_rank_0() -> None:
    hub = Agent(0, 0, Launcher.HYDRA)
    hub.join()
    hub.watch.on_failure(ObservedFailure(death(1), "n1"))
    turn_until([hub], lambda: hub.notes.reports, 1.0)
    hub.watch.close()


def test_in_a_step_of_slurm_the_hub_reports_at_once_although_rank_0_lives() -> None:
    """Slurm's PMIx plugin kills the step because of the death, with all agents, before rank 0 has spoken."""
    with running_world(Launcher.SLURM_PMIX) as world:
        hub, _, other = world
        other.dies()
        begin = time.monotonic()
        hub.turn()
        turn_until(world, lambda: hub.notes.reports)
        (report,) = reports(world)
        assert (report.failure.rank, report.host, report.reporter) == (other.rank, other.host, other.rank)
        assert time.monotonic() - begin < 1, "rank 0 would have two seconds"
        # what rank 0 says then has been said
        said = Report(death(other.rank), other.host, "error in serve: …", (), 0, "n0")
        hub.watch.publish(said, lambda: None)
        assert reports(world) == [report]


def test_a_rank_that_open_mpi_has_ended_is_not_reported_before_the_cause_can_be_known(world: list[Agent]) -> None:
    hub, _, other = world
    hub.dies(text=f"died: {ENDED_BY_MPI}")
    turn_until(world, lambda: hub.watch._unanswered)
    # all have answered, and the agent of the cause's node sees its rank's end after that
    turn_until(world, lambda: not hub.watch._unanswered)
    hub.turn()
    assert reports(world) == []
    other.dies(-1)  # on a busy machine the message takes some of it
    turn_until(world, lambda: reports(world))
    (report,) = reports(world)
    assert (report.failure.rank, [seen.failure.rank for seen in report.consequences]) == (other.rank, [0])
