# SPDX-License-Identifier: Apache-2.0
"""Detects how one rank was launched, from its environment variables, and refuses launches that can't become a world, before MPI runs.

A launcher's own variables take precedence over Slurm's, because ``mpirun`` inside an allocation starts one daemon per node with ``srun``,
and the ranks inherit *the daemon's* ``SLURM_PROCID`` and ``SLURM_NTASKS``. The variables of each launcher were recorded from real ones, see
``tests/slurm/recorded_environments.json``.

Without the checks, most mis-launches don't fail: every process becomes rank 0 of its own world of one (Open MPI 5 and MPICH under ``srun``
without the right plugin, even with exit code 0), and the first symptom is N workers that each try to load the whole model. The checks use
facts that every rank of a launch shares, so that all ranks refuse alike and none waits in ``MPI_Init``. Which ranks are on a node is not
such a fact: preflight, which has every rank's report, checks that they are in blocks.

Every rank of a world of hundreds imports this module, often from a shared file system: except for ``typing`` it imports nothing that
``mpi4py.MPI`` doesn't import anyway.
"""

from __future__ import annotations

import re
from enum import Enum

from dynamo_mpi.common.errors import LaunchError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Launcher(Enum):
    """The launcher that started the ranks, and its process management interface."""

    SLURM_PMIX = "srun --mpi=pmix"
    SLURM_PMI2 = "srun --mpi=pmi2"
    SRUN_WITHOUT_MPI = "srun without an MPI plugin"
    SLURM_SHELL = "a shell inside a Slurm allocation"
    OPEN_MPI = "Open MPI's mpirun"
    HYDRA = "MPICH's mpiexec"
    PMIX = "a PMIx launcher"
    ALONE = "no launcher"


MPICH_LAUNCHERS = (Launcher.HYDRA, Launcher.SLURM_PMI2)
"""Those of MPICH, which doesn't remove the shared memory of ranks that were killed, or aborted."""


class LaunchInfo(NamedTuple):
    """One rank's launch. A value that the launcher doesn't set is None.

    Args:
        launcher: the launcher.
        rank: this process's rank.
        size: number of ranks that the launcher started.
        local_rank: this process's number among those of its node, from 0.
        local_size: number of ranks on this node.
        ranks_per_node: number of ranks on each node, in the nodes' order; Slurm only.
        in_blocks: whether each node has consecutive ranks, if the launcher provides this to *every* rank, as ``srun --mpi=pmix`` does.
        job_id: Slurm's job id, if there is one.
        step_id: Slurm's step id, if there is one.
    """

    launcher: Launcher
    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None
    ranks_per_node: tuple[int, ...] | None = None
    in_blocks: bool | None = None
    job_id: str | None = None
    step_id: str | None = None


def detect_launcher(environ: Mapping[str, str]) -> LaunchInfo:
    """Detect the launcher from environment variables. Does not raise: unreadable values are None."""
    job, step = environ.get("SLURM_JOB_ID"), _step_id(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return LaunchInfo(
            Launcher.OPEN_MPI,
            rank=_number(environ, "OMPI_COMM_WORLD_RANK") or 0,
            size=_number(environ, "OMPI_COMM_WORLD_SIZE") or 1,
            local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
            local_size=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
            job_id=job,
        )
    if "PMI_RANK" in environ and ("HYDI_CONTROL_FD" in environ or "MPI_LOCALNRANKS" in environ or step is None):
        return LaunchInfo(
            Launcher.HYDRA,
            rank=_number(environ, "PMI_RANK") or 0,
            size=_number(environ, "PMI_SIZE") or 1,
            local_rank=_number(environ, "MPI_LOCALRANKID"),
            local_size=_number(environ, "MPI_LOCALNRANKS"),
            job_id=job,
        )
    if step is not None and "SLURM_PROCID" in environ:
        return _slurm_step(environ, job, step)
    if "PMIX_RANK" in environ:
        # PMIx provides the size only through its library; MPI will have it
        return LaunchInfo(Launcher.PMIX, rank=_number(environ, "PMIX_RANK") or 0, size=0, job_id=job)
    if job is not None and "SLURM_NTASKS" in environ:
        return LaunchInfo(Launcher.SLURM_SHELL, size=_number(environ, "SLURM_NTASKS") or 1, job_id=job)
    return LaunchInfo(Launcher.ALONE, job_id=job)


def _step_id(environ: Mapping[str, str]) -> str | None:
    """Return Slurm's step id; None outside of a step: Slurm 26.05 gives batch scripts the id -5."""
    step = environ.get("SLURM_STEP_ID")
    return None if step is None or step.startswith("-") else step


def _slurm_step(environ: Mapping[str, str], job: str | None, step: str) -> LaunchInfo:
    if "PMIX_RANK" in environ:
        launcher = Launcher.SLURM_PMIX
    elif "PMI_RANK" in environ:
        launcher = Launcher.SLURM_PMI2
    else:
        launcher = Launcher.SRUN_WITHOUT_MPI
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    ranks_per_node = expand_tasks_per_node(per_node) if per_node else None
    node = _number(environ, "SLURM_NODEID")
    local_size = None
    if ranks_per_node is not None and node is not None and node < len(ranks_per_node):
        local_size = ranks_per_node[node]
    return LaunchInfo(
        launcher,
        rank=_number(environ, "SLURM_PROCID") or 0,
        size=_number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS") or 1,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=local_size,
        ranks_per_node=ranks_per_node,
        in_blocks=mapping_is_in_blocks(environ.get("SLURM_PMIX_MAPPING_SERV", "")),
        job_id=job,
        step_id=step,
    )


def expand_tasks_per_node(text: str) -> tuple[int, ...] | None:
    """Expand Slurm's compressed list of tasks per node: ``"4(x2),3"`` is ``(4, 4, 3)``. None if it isn't one."""
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        out += [int(match[1])] * int(match[2] or 1)
    return tuple(out)


def mapping_is_in_blocks(text: str) -> bool | None:
    """Parse PMI's process mapping: ``"(vector,(0,2,2))"`` are 2 nodes from node 0 on, with 2 ranks each, one node after the other.

    Returns:
        Whether every node's ranks are consecutive, that is, no node comes twice; None if ``text`` isn't such a mapping.
    """
    body = text.strip().removeprefix("(vector,").removesuffix(")")
    blocks = [part.strip("()").split(",") for part in body.split("),(")]
    if body == text.strip() or any(len(block) != 3 or not all(n.isdecimal() for n in block) for block in blocks):
        return None
    seen = [node for first, count, _ in blocks for node in range(int(first), int(first) + int(count))]
    return len(seen) == len(set(seen))


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None


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


def check_user(launch: LaunchInfo, environ: Mapping[str, str], uid: int) -> None:
    """Refuse a container in which the user of the job has become another, such as root, before MPI_Init.

    Args:
        launch: how this rank was started.
        environ: its environment variables.
        uid: its user id.

    Raises:
        LaunchError: MPI couldn't connect to Slurm's PMIx server, which checks the user. PMI2 passes a descriptor instead.
    """
    job_user = environ.get("SLURM_JOB_UID", "")
    if launch.launcher is Launcher.SLURM_PMIX and job_user.isdecimal() and int(job_user) != uid:
        raise LaunchError(
            f"this rank runs as user {uid}, the job as user {job_user}: MPI can't connect to Slurm's PMIx server",
            expected="the job's user in the container too",
            fix="srun --no-container-remap-root ...   (Pyxis; the cluster's default is ENROOT_REMAP_ROOT)",
        )


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
        from dynamo_mpi.layout.format import counted

        variable = {
            Launcher.OPEN_MPI: "OMPI_COMM_WORLD_SIZE",
            Launcher.HYDRA: "PMI_SIZE",
        }.get(launch.launcher, "SLURM_NTASKS")
        raise LaunchError(
            f"{launch.launcher.value} started {counted(launch.size, 'rank')} ({variable}={launch.size}), "
            f"but MPI formed a world of {world_size} ({library.version})",
            expected="an MPI library that understands its launcher",
            fix="use the launcher that belongs to mpi4py's library, or `srun --mpi=pmix` with an Open MPI built with PMIx",
        )


ATTEMPT_VARIABLE = "DYN_MPI_ATTEMPT"
"""The variable that a program which restarts a worker sets: 1 for the first start."""
_REQUEUED = "SLURM_RESTART_COUNT"
_MOST = 10**6


def restart_count(environ: Mapping[str, str]) -> int:
    """Return the number of this start: the count of `ATTEMPT_VARIABLE`, plus one for each time that Slurm has requeued the job."""
    return starts_before(environ) + 1 + _count(environ, _REQUEUED)


def starts_before(environ: Mapping[str, str]) -> int:
    """Return the number of earlier starts by the program that started this worker."""
    return max(1, _count(environ, ATTEMPT_VARIABLE)) - 1


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    # an invalid number is ignored
    return min(int(text), _MOST) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
