# SPDX-License-Identifier: Apache-2.0
"""Detects how one rank was launched, from its environment variables.

A launcher's own variables take precedence over Slurm's, because ``mpirun`` inside an allocation starts one daemon per node with ``srun``,
and the ranks inherit *the daemon's* ``SLURM_PROCID`` and ``SLURM_NTASKS``. The variables of each launcher were recorded from real ones, see
``tests/slurm/recorded_environments.json``.

Every rank of a world of hundreds imports this module, often from a shared file system: except for ``typing`` it imports nothing that
``mpi4py.MPI`` doesn't import anyway.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

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
    job, step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")
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
