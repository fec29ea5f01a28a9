# SPDX-License-Identifier: Apache-2.0
"""Everything by which a user, srun or Slurm ends a step that serves: what comes of it, how soon, and that nothing is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamo_mpi.common.errors import of_signal
from tests.dynamo.running import eventually

from .session import SlurmSession
from .stack import SlurmWorker, Stack
from .test_worker import THREE_BY_ONE, library

pytestmark = pytest.mark.slurm
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
LEASE_SECONDS = 3


class Case(NamedTuple):
    """One way to end a step.

    Args:
        do: does it.
        code: srun's.
        says: words of the output.
        orderly: the worker drains, and takes its keys away itself.
        seconds: until srun has ended, beyond what it takes here.
    """

    do: Callable[[SlurmSession, SlurmWorker], None]
    code: int
    says: str
    orderly: bool
    seconds: float


def scancel(*words: str) -> Callable[[SlurmSession, SlurmWorker], None]:
    """Cancel with these words; JOB and STEP stand for the worker's."""

    def do(slurm: SlurmSession, worker: SlurmWorker) -> None:
        job = worker.job
        named = [word.replace("STEP", f"{job}.0").replace("JOB", job) for word in words]
        assert slurm.exec("scancel", *named).returncode == 0

    return do


def to_srun(*numbers: signal.Signals) -> Callable[[SlurmSession, SlurmWorker], None]:
    """Signal srun itself, as a terminal or a batch script does."""

    def do(slurm: SlurmSession, worker: SlurmWorker) -> None:
        for number in numbers:
            worker.process.send_signal(number)
            time.sleep(0.2)

    return do


def to_rank(node: str, number: signal.Signals) -> Callable[[SlurmSession, SlurmWorker], None]:
    """Signal the one rank of a node."""

    def do(slurm: SlurmSession, worker: SlurmWorker) -> None:
        (pid,) = worker.ranks()[node]
        os.kill(pid, number)

    return do


CASES = {
    "scancel --signal=TERM STEP": Case(scancel("--signal=TERM", "STEP"), 0, "drain: deregistered", True, 15),
    "scancel --signal=INT STEP": Case(scancel("--signal=INT", "STEP"), 0, "drain: deregistered", True, 15),
    "scancel JOB": Case(scancel("JOB"), 0, "drain: deregistered", True, 15),
    "scancel STEP": Case(scancel("STEP"), 137, "CANCELLED", False, 10),
    "SIGTERM to a rank": Case(to_rank("n2", TERM), 0, "rank 1 on n2 got SIGTERM, which goes for all ranks", True, 15),
    "SIGINT to a rank": Case(to_rank("n3", INT), 0, "rank 2 on n3 got SIGINT, which goes for all ranks", True, 15),
    "SIGTERM to rank 0": Case(to_rank("n1", TERM), 0, "drain: deregistered", True, 15),
    "Ctrl-C twice": Case(to_srun(INT, INT), 137, "srun: sending Ctrl-C to StepId", False, 10),
    "SIGTERM to srun": Case(to_srun(TERM), 137, "forcing job termination", False, 10),
}


@pytest.fixture
def start(stack: Stack, tmp_path: Path, small_model_dir: Path) -> Iterator[Callable[..., SlurmWorker]]:
    """Start a worker with a rank on each of three nodes; whatever is left of it is ended."""
    workers: list[SlurmWorker] = []

    def begin(*options: str, **environment: str) -> SlurmWorker:
        config = tmp_path / "engine.yaml"
        config.write_text(THREE_BY_ONE.engine_config)
        variables = {**stack.environment, **library(stack.slurm, "pmix"), **environment}
        srun = ("--mpi=pmix", *THREE_BY_ONE.options(stack.slurm), *options)
        flags = ("--model", str(small_model_dir), "--engine-config", str(config))
        workers.append(SlurmWorker(stack.slurm, tmp_path, srun, flags, variables))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


@pytest.mark.landing("scancel STEP")
@pytest.mark.parametrize("how", list(CASES))
def test_what_ends_a_step_that_serves(
    how: str, start: Callable[..., SlurmWorker], slurm: SlurmSession, stack: Stack
) -> None:
    case = CASES[how]
    worker = start("--kill-on-bad-exit=1", ETCD_LEASE_TTL=str(LEASE_SECONDS))
    worker.ready()
    begin = time.monotonic()
    case.do(slurm, worker)
    assert worker.wait() == case.code, worker.text()
    assert time.monotonic() - begin < case.seconds
    assert case.says in worker.text(), worker.text()
    assert "Traceback" not in worker.text()
    eventually(lambda: worker.ranks() == {}, "no rank is left", 5)
    eventually(lambda: stack.keys() == [], "the keys are gone", 1 if case.orderly else 2 * LEASE_SECONDS + 5)
    if case.orderly:
        assert "exit: done" in worker.text()
        assert not worker.ready_file.exists()


@pytest.mark.full
def test_one_ctrl_c_asks_srun_for_its_state_only(start: Callable[..., SlurmWorker], slurm: SlurmSession) -> None:
    worker = start()
    worker.ready()
    ranks = worker.ranks()
    worker.process.send_signal(INT)
    worker.wait_for_text("interrupt (one more within 1 sec to abort)")
    time.sleep(1.5)  # a signal that went on to the ranks would have begun the drain
    assert worker.ranks() == ranks, worker.text()
    assert "drain" not in worker.text()
    scancel("--signal=TERM", "STEP")(slurm, worker)
    assert worker.wait() == 0, worker.text()


@pytest.mark.landing("K1-n3")
@pytest.mark.parametrize("node", ["n1", "n3"])
@pytest.mark.parametrize("options", [(), ("--kill-on-bad-exit=1",)], ids=["", "K1"])
def test_a_signal_while_a_rank_hangs_in_native_code_and_the_others_in_mpi(
    options: tuple[str, ...], node: str, start: Callable[..., SlurmWorker]
) -> None:
    shims = Path(__file__).parents[1] / "dynamo" / "programs" / "shims"
    ours = Path(__file__).parents[2]
    worker = start(*options, PYTHONPATH=f"{shims}{os.pathsep}{ours}", SHIM_SLEEPER="1")
    eventually(lambda: worker.text().count(" is in load, ") == 3, "all load")
    begin = time.monotonic()
    (pid,) = worker.ranks()[node]
    os.kill(pid, TERM)
    assert worker.wait() == of_signal(TERM), worker.text()
    assert time.monotonic() - begin < 8
    assert "error in load: stopped by SIGTERM" in worker.text()
    assert ("which goes for all ranks" in worker.text()) is (node == "n3")
    eventually(lambda: worker.ranks() == {}, "no rank is left", 5)
