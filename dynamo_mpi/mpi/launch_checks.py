# SPDX-License-Identifier: Apache-2.0
"""Refuses, before ``MPI_Init``, launches that cannot form the requested world.

Without these checks, most of them don't fail: every process becomes rank 0 of its own world of one (Open MPI 5 and MPICH under ``srun``
without the right plugin, even with exit code 0), and the first symptom is N workers that each try to load the whole model.

All rules use facts that every rank of a launch shares, so that all ranks refuse alike and none waits in ``MPI_Init``. Which ranks are on a
node is not such a fact: preflight, which has every rank's report, checks that they are in blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from dynamo_mpi.common.errors import LaunchError
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo


class MpiLibrary(NamedTuple):
    """The MPI library that mpi4py uses, known before ``MPI_Init``.

    Args:
        family: ``"openmpi"``, ``"mpich"`` (with its relatives: Intel MPI, MVAPICH, Cray), or ``"unknown"``.
        version: the first line of the library's version string.
        pmix: whether an MPICH was configured with PMIx.
    """

    family: str
    version: str
    pmix: bool = False


def identify_mpi(text: str) -> MpiLibrary:
    """Parse the result of ``MPI_Get_library_version``."""
    stripped = text.strip().strip("\0")
    first = (stripped.splitlines() or [""])[0].split(", package", 1)[0].replace("\t", " ").strip()
    if first.startswith("Open MPI"):
        return MpiLibrary("openmpi", first)
    if any(name in first for name in ("MPICH", "Intel(R) MPI", "MVAPICH", "CRAY")):
        configured = stripped.lower().replace("--without-pmix", "")
        return MpiLibrary("mpich", " ".join(first.split()), pmix="pmix" in configured)
    return MpiLibrary("unknown", first)


def check_launch(launch: LaunchInfo, library: MpiLibrary) -> None:
    """Check that a launch can form one world.

    Raises:
        LaunchError: it can't; the error contains the command that works.
    """
    _refuse_singletons(launch, library)
    _refuse_wrong_library(launch, library)
    _refuse_placement(launch)
    _refuse_scatter(launch)


def _refuse_singletons(launch: LaunchInfo, library: MpiLibrary) -> None:
    if launch.launcher is Launcher.SRUN_WITHOUT_MPI and launch.size > 1:
        raise LaunchError(
            f"srun started {launch.size} tasks without an MPI plugin: each would be rank 0 of a world of 1",
            expected=f"one MPI world of {launch.size} ranks",
            fix="srun --mpi=pmix ...   (see `srun --mpi=list`; with MPICH: --mpi=pmi2)",
        )
    if launch.launcher is Launcher.SRUN_WITHOUT_MPI and library.version.startswith("Open MPI v4."):
        # 5.x, and MPICH, form a world of one there
        raise LaunchError(
            f"srun started one task without an MPI plugin, where {library.version} can't even start alone",
            expected="srun with the plugin of mpi4py's MPI library",
            fix="srun --mpi=pmix ...   (see `srun --mpi=list`)",
        )
    if launch.launcher is Launcher.SLURM_SHELL and launch.size > 1:
        raise LaunchError(
            f"started once, without srun, inside Slurm job {launch.job_id} of {launch.size} tasks",
            expected=f"one MPI world of {launch.size} ranks",
            fix=f"srun --mpi=pmix -n {launch.size} python -m dynamo_mpi.worker ...   (with MPICH: --mpi=pmi2)",
        )


def _refuse_wrong_library(launch: LaunchInfo, library: MpiLibrary) -> None:
    pairs = {
        Launcher.OPEN_MPI: ("openmpi", "mpiexec of the MPI that mpi4py uses"),
        Launcher.HYDRA: ("mpich", "mpirun of the MPI that mpi4py uses"),
        Launcher.SLURM_PMI2: ("mpich", "srun --mpi=pmix ..."),
    }
    if launch.launcher in pairs:
        family, command = pairs[launch.launcher]
        if library.family in ("unknown", family):
            return
    elif launch.launcher in (Launcher.SLURM_PMIX, Launcher.PMIX) and library.family == "mpich" and not library.pmix:
        family, command = "openmpi", "srun --mpi=pmi2 ..."
    else:
        return
    name = {"openmpi": "Open MPI", "mpich": "MPICH"}[family]
    raise LaunchError(
        f"the ranks were started by {launch.launcher.value}, but mpi4py uses {library.version}: "
        "each rank would be alone",
        expected=f"an mpi4py over {name}, or the launcher that goes with its library",
        # not MPI4PY_MPIABI: with it, mpi4py doesn't open the library that MPI4PY_LIBMPI names
        fix=f"{command}, or choose the library: MPI4PY_LIBMPI=/path/to/{name.replace(' ', '-').lower()}/libmpi.so",
    )


def _refuse_placement(launch: LaunchInfo) -> None:
    per_node = launch.ranks_per_node
    if per_node is None or launch.size <= 1:
        return
    if len(set(per_node)) > 1:
        raise LaunchError(
            f"the {launch.size} ranks are spread unequally over {len(per_node)} nodes: {', '.join(map(str, per_node))}",
            expected="the same number of ranks on every node: the engine takes node = rank // ranks per node (A11)",
            fix=f"srun --nodes={len(per_node)} --ntasks-per-node={-(-launch.size // len(per_node))} ...",
        )


def _refuse_scatter(launch: LaunchInfo) -> None:
    if launch.in_blocks is False:
        raise LaunchError(
            f"the {launch.size} ranks are not placed in blocks: ranks that follow each other are on different nodes",
            expected="consecutive ranks on each node: the engine takes node = rank // ranks per node (A11)",
            fix="srun --distribution=block ...",
        )


def check_world_size(launch: LaunchInfo, library: MpiLibrary, world_size: int) -> None:
    """Compare the launcher's number of ranks with MPI's after MPI_Init.

    Raises:
        LaunchError: they differ, so MPI did not understand its launcher.
    """
    if launch.size and launch.size != world_size:
        variable = {
            Launcher.OPEN_MPI: "OMPI_COMM_WORLD_SIZE",
            Launcher.HYDRA: "PMI_SIZE",
        }.get(launch.launcher, "SLURM_NTASKS")
        raise LaunchError(
            f"{launch.launcher.value} started {launch.size} ranks ({variable}={launch.size}), "
            f"but MPI formed a world of {world_size} ({library.version})",
            expected="an MPI library that understands its launcher",
            fix="use the launcher that belongs to mpi4py's library, or `srun --mpi=pmix` with an Open MPI built with PMIx",
        )
