# SPDX-License-Identifier: Apache-2.0
"""A node that a worker's ranks report as lost: what confirms it, and that no step of many seconds is waited for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.checks.node_probe import HERE, ProbeResult
from dynamo_mpi.deploy.blame import RankReport
from dynamo_mpi.deploy.node_inquiry import Inquiry, NodeProber
from dynamo_mpi.deploy.node_watch import NodeWatch
from dynamo_mpi.deploy.nodes import Worker
from dynamo_mpi.deploy.reports import Beginning
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import MpirunStepController
from tests.dynamo.running import eventually

HEALTHY, SILENT = "n1", "n2"


class Probes:
    """Builds a probe that finds nothing wrong, or for the silent node one that doesn't end, as srun's to a lost node."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def probe(self, node: str) -> Command:
        self.asked.append(node)
        words = ("sleep", "600") if node == SILENT else ("printf", "%s\\n", HERE, ProbeResult().line)
        return Command(f"probe-{node}", f"probe-{node}", (words,))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> NodeWatch:
    """A watch that has seen nothing yet."""
    silent: set[str] = set()
    watch = NodeWatch((HEALTHY, SILENT))
    monkeypatch.setattr(watch, "is_silent", silent.__contains__)
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
