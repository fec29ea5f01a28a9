# SPDX-License-Identifier: Apache-2.0
"""``--stage auto``: whether and where a model is staged if the user has named no folder. Careful, as the user has not asked for it.

Only with a folder that the site gives each job on each node's disk, by a variable of one of these names:

    SLURM_TMPDIR    Digital Research Alliance of Canada, Mila
    LOCAL_SCRATCH   CSC
    L_SCRATCH       Stanford's Sherlock
    SCRATCH_LOCAL   PLGrid, Fred Hutch
    SNIC_TMP        Sweden's NAISS centres

``TMPDIR`` isn't among them: it is often a shared folder, or memory.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.stage.file_system import file_system_type, is_in_memory, is_shared

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTO, NONE = "auto", "none"
VARIABLES = ("SLURM_TMPDIR", "LOCAL_SCRATCH", "L_SCRATCH", "SCRATCH_LOCAL", "SNIC_TMP")


class SiteFolder(NamedTuple):
    """A folder on a node's disk.

    Args:
        path: the folder.
        variable: what names it.
        problem: why it can't be used, beginning with a verb; empty if it can.
    """

    path: str
    variable: str
    problem: str = ""


def site_folder(environ: Mapping[str, str]) -> SiteFolder | None:
    """Return the folder that the site gives jobs; None if no variable is set."""
    for variable in VARIABLES:
        if path := environ.get(variable):
            return SiteFolder(path, variable, problem_of(path))
    return None


def folder_to_use(stage: str, environ: Mapping[str, str]) -> str:
    """Return the folder that ``--stage`` means where copies are all that is asked for.

    Raises:
        UsageError: it is ``none``; or ``auto``, and the site gives jobs no folder, or one that is no place for copies.
    """
    if stage not in (AUTO, NONE):
        return stage
    found = site_folder(environ) if stage == AUTO else None
    if found is not None and not found.problem:
        return found.path
    raise UsageError(
        "no folder was given" if found is None else f"{found.variable} ({found.path}) {found.problem}",
        expected="the workers' folder, on a disk of each node",
        fix="--stage DIR, or DYN_MPI_STAGE=DIR",
    )


def problem_of(path: str) -> str:
    """Return why a folder is no place for copies that the user hasn't asked for; empty if it is one."""
    if not os.path.isabs(path):
        return "is no absolute path"
    try:
        status, kind = os.stat(path), file_system_type(path)
    except OSError as error:
        return f"can't be used: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by others"
    if is_shared(kind):
        return f"is on a shared file system ({kind})"
    if is_in_memory(kind):
        return "is in memory"
    return ""


def read_by_each_node(model: str, nodes: int) -> str:
    """Return the type of the shared file system from which each of several nodes reads the whole model; empty if that isn't so.

    Args:
        model: its folder.
        nodes: how many read it.
    """
    try:
        kind = file_system_type(model)
    except OSError:
        return ""
    return kind if nodes > 1 and is_shared(kind) else ""
