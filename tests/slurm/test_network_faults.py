# SPDX-License-Identifier: Apache-2.0
"""A worker over three hosts of which one is cut off or powered off while it serves: both sides end, and rank 0's says which host it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dynamo.running import eventually, failure_in

from .conftest import MakeSlurm
from .session import SlurmSession
from .stack import SlurmWorker, Stack, running_stack
from .test_worker import THREE_BY_ONE, library

pytestmark = pytest.mark.slurm
HEARTBEAT = 2.0
# beyond the product's limits: the report comes within the heartbeat timeout, a rank that is cut off leaves some seconds later
REPORT_SECONDS, LEAVE_SECONDS = HEARTBEAT + 4, HEARTBEAT + 8


@pytest.fixture
def stack(make_slurm: MakeSlurm, tmp_path: Path) -> Iterator[Stack]:
    """A cluster of the test's own, as Slurm takes a minute to trust a node again, with etcd and the frontend on its login node."""
    slurm = make_slurm(nodes=3)
    with running_stack(slurm, tmp_path) as running:
        yield running
    slurm.cluster.down()


@pytest.fixture
def slurm(stack: Stack) -> SlurmSession:
    """That cluster."""
    return stack.slurm


@pytest.fixture
def worker(slurm: SlurmSession, stack: Stack, tmp_path: Path, small_model_dir: Path) -> SlurmWorker:
    """A worker that serves, a rank on each of three nodes."""
    config = tmp_path / "engine.yaml"
    config.write_text(THREE_BY_ONE.engine_config)
    # one start in some 30 wasn't ready in time: a start that hangs in MPI ends within that time then, with where each rank hangs
    limits = ("--heartbeat-timeout", str(HEARTBEAT), "--world-timeout", "40")
    flags = ("--model", str(small_model_dir), "--engine-config", str(config), *limits)
    started = SlurmWorker(
        slurm,
        tmp_path,
        ("--mpi=pmix", *THREE_BY_ONE.options(slurm)),
        (*flags, "--failure-dir", str(tmp_path / "failures")),
        {**stack.environment, **library(slurm, "pmix")},
    )
    started.ready()
    return started


@pytest.mark.full
@pytest.mark.parametrize("rank", [1, 2])
def test_a_cut_between_nodes_ends_both_sides(rank: int, worker: SlurmWorker, slurm: SlurmSession, stack: Stack) -> None:
    node = slurm.nodes[rank]
    begin = time.monotonic()
    slurm.switch_cable(node, on=False)
    worker.wait_for_text(f"error in serve: rank {rank} on {node} is lost: its host doesn't answer", REPORT_SECONDS)
    eventually(lambda: stack.keys() == [], "the keys are gone", 3)
    # nothing reaches the ranks that are cut off, so these see for themselves
    eventually(lambda: node not in worker.ranks(), "no rank is left there", LEAVE_SECONDS)
    left = time.monotonic() - begin
    eventually(lambda: worker.ranks() == {}, "no rank is left anywhere", 5)
    code = worker.wait()
    print(f"left {left:.1f} s, srun {time.monotonic() - begin:.1f} s, code {code}\n{worker.text()}")
    assert code == 75, worker.text()
    assert worker.text().count(": error in ") == 1, worker.text()
    report = failure_in(worker.ready_file.parent / "failures" / "backend-rank-0.json")
    assert (report["rank"], report["host"], report["cause"], report["exit_code"]) == (
        rank,
        node,
        "host_unreachable",
        75,
    )


def test_rank_0_cut_off_ends_both_sides(worker: SlurmWorker, slurm: SlurmSession) -> None:
    slurm.switch_cable(slurm.nodes[0], on=False)
    # said for it by the node agent of another node
    worker.wait_for_text("rank 0 on n1: error in serve: is lost: its host doesn't answer", REPORT_SECONDS)
    eventually(lambda: worker.ranks() == {}, "no rank is left on either side", LEAVE_SECONDS)
    code = worker.wait()
    print(f"code {code}\n{worker.text()}")
    assert code == 75, worker.text()
    assert worker.text().count(": error in ") == 1, worker.text()


@pytest.mark.full
def test_a_node_that_is_powered_off_is_lost(worker: SlurmWorker, slurm: SlurmSession, stack: Stack) -> None:
    node = slurm.nodes[2]
    begin = time.monotonic()
    slurm.kill_node(node)
    worker.wait_for_text(f"error in serve: rank 2 on {node} is lost: its host doesn't answer", REPORT_SECONDS)
    eventually(lambda: stack.keys() == [], "the keys are gone", 3)
    code = worker.wait()
    print(f"srun {time.monotonic() - begin:.1f} s, code {code}\n{worker.text()}")
    assert code == 75, worker.text()
