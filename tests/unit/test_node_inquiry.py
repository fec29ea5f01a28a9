# SPDX-License-Identifier: Apache-2.0
"""A node that a worker's ranks report as lost: what confirms it, and that no step of many seconds is waited for."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo_mpi.checks.node_probe import HERE, ProbeResult
from dynamo_mpi.deploy import node_inquiry
from dynamo_mpi.deploy.blame import Blame, RankReport
from dynamo_mpi.deploy.failures import FailureHandler
from dynamo_mpi.deploy.node_inquiry import Inquiry, NodeProber
from dynamo_mpi.deploy.node_watch import NodeWatch
from dynamo_mpi.deploy.nodes import Placement, Worker
from dynamo_mpi.deploy.recovery import Degrade, MoveToSpare, Stop
from dynamo_mpi.deploy.reports import Beginning
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.spare_checks import Judgement
from dynamo_mpi.deploy.spares import SparePool
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import MpirunStepController, Step, start
from dynamo_mpi.deploy.worker_ends import last_silence
from dynamo_mpi.mpi.launcher import ATTEMPT_VARIABLE
from dynamo_mpi.supervisor.failure_reports import silent_host
from tests.dynamo.running import eventually

HEALTHY, SILENT, SPARE = "n1", "n2", "n3"


class Probes:
    """Builds a probe that finds nothing wrong, or for the silent node one that doesn't end, as srun's to a lost node.

    Args:
        others: by node, another command.
    """

    def __init__(self, **others: tuple[str, ...]) -> None:
        self.asked: list[str] = []
        self._others = others

    def probe(self, node: str) -> Command:
        self.asked.append(node)
        words = ("sleep", "600") if node == SILENT else ("printf", "%s\\n", HERE, ProbeResult().line)
        return Command(f"probe-{node}", f"probe-{node}", (self._others.get(node, words),))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> NodeWatch:
    """A watch that has seen nothing yet."""
    silent: set[str] = set()
    watch = NodeWatch((HEALTHY, SILENT))
    monkeypatch.setattr(watch, "is_silent", silent.__contains__)
    monkeypatch.setattr(watch, "is_unreachable", silent.__contains__)
    monkeypatch.setattr(watch, "silent", silent, raising=False)
    return watch


@pytest.fixture
def prober(tmp_path: Path, watch: NodeWatch) -> Iterator[NodeProber]:
    run_dir = RunDir(tmp_path / "run")
    yield NodeProber(Probes(), MpirunStepController(), run_dir, watch)
    run_dir.close()


def health(inquiry: Inquiry) -> dict[str, str]:
    """Wait for the result; return problems by node."""
    found = eventually(inquiry.poll, "the nodes' health", 5)
    return {each.node: each.problem for each in found}


def test_a_reported_node_that_takes_no_connection_is_lost_without_a_step(prober: NodeProber, watch: Any) -> None:
    watch.silent.add(SILENT)
    inquiry = prober.begin((HEALTHY, SILENT), {"PATH": "/usr/bin:/bin"}, (SILENT,))
    problems = health(inquiry)
    assert problems[HEALTHY] == ""
    assert "doesn't answer its worker's other ranks, nor a connection" in problems[SILENT]
    assert prober._builder.asked == [HEALTHY]  # type: ignore[attr-defined] # of the stand-in


def test_a_reported_node_is_lost_as_soon_as_a_connection_fails(prober: NodeProber, watch: Any) -> None:
    inquiry = prober.begin((HEALTHY, SILENT), {"PATH": "/usr/bin:/bin"}, (SILENT,))
    (step,) = [step for node, step in inquiry._steps.items() if node == SILENT]
    assert inquiry.poll() is None
    watch.silent.add(SILENT)
    assert health(inquiry)[SILENT]
    assert step.child.exit_code() is not None


@pytest.mark.parametrize("suspects", [(), (HEALTHY,)])
def test_silence_alone_is_no_proof_and_nor_is_a_report(
    prober: NodeProber, watch: Any, suspects: tuple[str, ...]
) -> None:
    watch.silent.add(SILENT)
    inquiry = prober.begin((HEALTHY, SILENT), {"PATH": "/usr/bin:/bin"}, suspects)
    eventually(lambda: inquiry.poll() or HEALTHY not in inquiry._steps, "the healthy node's result", 5)
    assert inquiry.poll() is None
    inquiry.close()


def test_a_spare_that_was_taken_meanwhile_is_asked_no_longer(prober: NodeProber) -> None:
    inquiry = prober.begin((HEALTHY, SILENT), {"PATH": "/usr/bin:/bin"})
    (step,) = [step for node, step in inquiry._steps.items() if node == SILENT]
    assert inquiry.poll() is None
    inquiry.drop(SILENT)
    assert step.child.exit_code() is not None
    assert health(inquiry) == {HEALTHY: ""}


class NoSteps:
    """Makes a spare ready without a step."""

    def prepare(self, node: str) -> Sequence[Command]:
        return ()


@pytest.mark.parametrize(
    ("known_of_spare", "domain", "is_probed"), [("", "", False), ("silent", "", True), ("", "rack 1", True)]
)
@pytest.mark.parametrize("blamed", [SILENT, HEALTHY])
def test_a_lost_node_is_replaced_at_once_unless_something_else_is_to_be_found_out(
    prober: NodeProber, watch: Any, known_of_spare: str, domain: str, is_probed: bool, blamed: str
) -> None:
    run_dir, controller = prober._run_dir, MpirunStepController()
    spares = SparePool((SPARE,), NoSteps(), controller, run_dir, lambda *_: None)
    spares.start({"PATH": "/usr/bin:/bin"})
    spares.domains[SPARE] = domain
    watch.silent |= {SILENT, *([SPARE] if known_of_spare else [])}
    worker = Worker("agg-0", "agg", "config", (HEALTHY, SILENT), 1)
    order = (HEALTHY, SILENT, SPARE)
    failures = FailureHandler(Placement((worker,), (SPARE,), "n0", order), 3, spares, prober, run_dir)
    # each half may call the other lost
    other = HEALTHY if blamed == SILENT else SILENT
    found = Blame(75, 1, blamed, "serve", "its host is lost", suspects=(blamed,), reporter=other)
    failures.failed(worker, found, 60.0, {"PATH": "/usr/bin:/bin"})
    assert bool(prober._builder.asked) == is_probed  # type: ignore[attr-defined] # of the stand-in
    action = eventually(lambda: failures.due(worker, ()), "what follows", 5)
    assert isinstance(action, MoveToSpare) and action.moves == ((SILENT, SPARE),)
    assert failures.workers[0].nodes == (HEALTHY, SPARE)
    failures.close()


DIFFERS, OLD = "P2: /engine.yaml differs from that on n1", "P4: Python is cpython 3.10, on n1 cpython 3.12"


@pytest.mark.parametrize("others", [(), ("agg-1",)])
@pytest.mark.parametrize(
    ("doubtful", "unfit", "used"),
    [
        ((), (), "n3"),
        (("n3",), (), "n4"),
        (("n3", "n4"), (), "n3"),
        ((), ("n3",), "n4"),
        (("n4",), ("n3",), "n4"),
        ((), ("n3", "n4"), ""),
    ],
)
def test_a_spare_with_other_files_is_the_last_choice_and_one_that_differs_otherwise_is_none(
    prober: NodeProber,
    watch: Any,
    monkeypatch: pytest.MonkeyPatch,
    doubtful: Sequence[str],
    unfit: Sequence[str],
    used: str,
    others: Sequence[str],
) -> None:
    gone: list[str] = []
    environment = {"PATH": "/usr/bin:/bin"}
    run_dir, controller = prober._run_dir, MpirunStepController()
    spares = SparePool(("n3", "n4"), NoSteps(), controller, run_dir, lambda *each: gone.append(each[0]), 1)
    spares.start(environment)
    found = {
        node: Judgement(
            {"agg-0": OLD} if node in unfit else {}, {"agg-0": DIFFERS} if node in doubtful else {}, (), False
        )
        for node in ("n3", "n4")
    }
    monkeypatch.setattr(spares._comparer, "look", lambda _: found)
    spares.poll()
    assert gone == list(unfit)
    reasons = {spare.node: spare.reason for spare in spares.spares}
    assert {node for node, reason in reasons.items() if reason == f"the last choice for agg-0: {DIFFERS}"} == {
        *doubtful
    }
    worker = Worker("agg-0", "agg", "config", (HEALTHY, SILENT), 1)
    failures = FailureHandler(
        Placement((worker,), ("n3", "n4"), "n0", (HEALTHY, SILENT, "n3", "n4")), 3, spares, prober, run_dir
    )
    assert failures.nearest_spares("agg-0", SILENT) == tuple(sorted({"n3", "n4"} - {*doubtful, *unfit}))
    said = f"; not fit for agg-0: {', '.join(f'{node} ({DIFFERS})' for node in doubtful)}" if doubtful else ""
    assert failures.unfit_spares("agg-0") == said
    watch.silent |= {SILENT}
    failures.failed(worker, Blame(75, 1, SILENT, "serve", "its host is lost", suspects=(SILENT,)), 60.0, environment)
    action = eventually(lambda: failures.due(worker, others), "what follows", 5)
    if used and not (others and used in doubtful):
        assert isinstance(action, MoveToSpare) and action.moves == ((SILENT, used),)
        # what its preflight refuses there is the spare's fault
        mistake = Blame(65, 0, HEALTHY, "preflight", "P2", is_mistake=True)
        failures.failed(failures.workers[0], mistake, 0.0, environment)
        ended = eventually(lambda: failures.due(failures.workers[0], others), "what follows", 5)
        assert isinstance(ended, Stop) and ended.code == (75 if used in doubtful else 65)
        assert (used in {each.node for each in failures.excluded}) == (used in doubtful)
    else:
        assert isinstance(action, Degrade if others else Stop)
    failures.close()


def test_a_warning_about_a_silent_host_lets_the_nodes_be_looked_at_once(tmp_path: Path) -> None:
    line = f"0: dynamo_mpi: rank 0 on n1: warning: rank 1 on n2: {silent_host(1.0)}"
    step = start(Command("agg-0", "agg-0", (("printf", "%s\\n", "begun", line, "more"),)), os.environ, tmp_path / "log")
    assert step.child.wait(5)
    assert last_silence(step) == line
    quiet = start(Command("agg-1", "agg-1", (("echo", "begun"),)), os.environ, tmp_path / "other")
    assert quiet.child.wait(5) and last_silence(quiet) == ""


WAITS, FAILS, WELL = ("sleep", "600"), ("false",), ("printf", "%s\\n", HERE, ProbeResult().line)


class Start(NamedTuple):
    """How the launcher starts probes, and which nodes are blamed for it.

    Args:
        n1: the probe on a node.
        n2: the same; empty if it isn't asked.
        is_watched: whether the nodes are watched.
        suspects: nodes that the worker's ranks have reported.
        silent: nodes that take no connection.
        blamed: the nodes whose fault it is.
    """

    n1: tuple[str, ...]
    n2: tuple[str, ...] = ()
    is_watched: bool = True
    suspects: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()


STARTS = {
    "no node takes a step": Start(WAITS, WAITS),
    "no node takes a step, without a watch": Start(WAITS, WAITS, is_watched=False),
    "one takes none, another one does": Start(WAITS, WELL, blamed=("n1",)),
    "one takes none, another one does, without a watch": Start(WAITS, WELL, is_watched=False, blamed=("n1",)),
    "the only one takes none, and slurmctld answers": Start(WAITS, blamed=("n1",)),
    "… nobody asks slurmctld": Start(WAITS, is_watched=False),
    "the launcher fails everywhere": Start(FAILS, FAILS, silent=("n1", "n2")),
    "the launcher fails everywhere, without a watch": Start(FAILS, FAILS, is_watched=False),
    "… for the only node": Start(FAILS, is_watched=False),
    "… for one that the ranks have reported": Start(FAILS, is_watched=False, suspects=("n1",), blamed=("n1",)),
    "it fails for one, whose host answers": Start(FAILS, WELL),
    "it fails for one, whose host doesn't answer": Start(FAILS, WELL, silent=("n1",), blamed=("n1",)),
    "it fails for one, and nothing is known of its host": Start(FAILS, WELL, is_watched=False, blamed=("n1",)),
}


@pytest.mark.parametrize("name", STARTS)
def test_whose_fault_a_probe_is_that_does_not_start(
    name: str, tmp_path: Path, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_inquiry, "STEP_SECONDS", 1.0)
    monkeypatch.setattr(node_inquiry, "ANSWER_SECONDS", 1.0)
    case = STARTS[name]
    watch.silent.update(case.silent)
    with contextlib.closing(RunDir(tmp_path / "run")) as run_dir:
        asked = Probes(n1=case.n1, n2=case.n2)
        prober = NodeProber(asked, MpirunStepController(), run_dir, watch if case.is_watched else None)
        nodes = ("n1", "n2") if case.n2 else ("n1",)
        found = health(prober.begin(nodes, {"PATH": "/usr/bin:/bin"}, case.suspects))
    assert tuple(node for node, problem in found.items() if problem) == case.blamed, found


def test_probes_are_ended_by_one_request(prober: NodeProber, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[list[str]] = []
    cancel = prober._step_controller.cancel

    def count(steps: Sequence[Step]) -> None:
        requests.append([step.name for step in steps])
        cancel(steps)

    monkeypatch.setattr(prober._step_controller, "cancel", count)
    monkeypatch.setattr(prober, "_builder", Probes(n1=WAITS, n3=WELL))
    inquiry = prober.begin(("n1", "n2", "n3"), {"PATH": "/usr/bin:/bin"})
    eventually(lambda: inquiry.poll() or "n3" not in inquiry._steps, "one has ended by itself", 5)
    inquiry.close()
    assert requests[-1] == ["probe-n1", "probe-n2"]
    assert requests[:-1] in ([], [["probe-n3"]])  # it may have printed its result, and not ended yet


def test_time_without_slurmctld_does_not_count(
    prober: NodeProber, watch: NodeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_inquiry, "STEP_SECONDS", 0.2)
    watch._controller_answers = False
    inquiry = prober.begin((SILENT,), {"PATH": "/usr/bin:/bin"})
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert inquiry.poll() is None
    watch._controller_answers = True
    assert "it takes no step" in health(inquiry)[SILENT]


@pytest.mark.parametrize(
    ("cause", "report", "hosts"),
    [
        ("host_unreachable", "rank 1 on n4 is lost", {"n4"}),
        # of a rank alone, which sees that its peer has gone
        ("host_unreachable", None, set()),
        ("disconnect", "rank 1 on n4 died", set()),
    ],
)
def test_which_hosts_a_workers_report_calls_lost(tmp_path: Path, cause: str, report: Any, hosts: set[str]) -> None:
    worker = Worker("agg-0", "agg", "e.yaml", ("n3", "n4"), 1)
    command = Command("agg-0", "agg-0", (("--model", "m"),))
    begun = Beginning.of(worker, command, {}, tmp_path)
    content = {
        "rank": 1,
        "host": "n4",
        "phase": "serve",
        "cause": cause,
        "exit_code": 75,
        "error": "x",
        "time": time.time(),
    }
    path = tmp_path / "backend-rank-0.json"
    path.write_text(json.dumps({**content, **({} if report is None else {"report": report})}))
    path.chmod(0o600)
    assert RankReport.of(json.loads(path.read_text())).host == "n4"
    assert begun.lost_hosts().keys() == hosts


@pytest.mark.parametrize(("attempt", "is_own"), [(1, False), (2, True), (None, True)])
def test_a_failure_file_of_an_earlier_start_is_not_this_ones(tmp_path: Path, attempt: int | None, is_own: bool) -> None:
    worker = Worker("agg-0", "agg", "e.yaml", ("n3", "n4"), 1)
    begun = Beginning.of(worker, Command("agg-0", "agg-0", (("--model", "m"),)), {ATTEMPT_VARIABLE: "2"}, tmp_path)
    assert begun.origin.attempt == 2
    # of a rank that is cut off, and writes it only now, into a folder that both sides see
    content = {"rank": 0, "host": "n3", "phase": "serve", "cause": "host_unreachable", "exit_code": 75, "error": "x"}
    named = {} if attempt is None else {"attempt": attempt}
    path = tmp_path / "backend-rank-1.json"
    path.write_text(json.dumps({**content, "time": time.time(), "report": "rank 0 on n3 is lost", **named}))
    path.chmod(0o600)
    assert (begun.has_files, bool(begun.reports()), begun.lost_hosts().keys() == {"n3"}) == (is_own,) * 3
