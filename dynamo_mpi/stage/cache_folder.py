# SPDX-License-Identifier: Apache-2.0
"""Where a rank has its compile caches on its node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_mpi.common.claimed_folder import ClaimedFolder, claim
from dynamo_mpi.common.folder_walk import UnsafeFileError, reason
from dynamo_mpi.common.own_files import make_folder
from dynamo_mpi.layout.format import gib
from dynamo_mpi.stage.file_system import file_system_type, free_bytes, is_shared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OWN_TMPDIR = "$TMPDIR"
"""Among the bases: ``TMPDIR`` of each rank, as Slurm may give each node its own."""
ROOM = 1 << 30
"""Bytes that must be free for each rank of a node."""


def bases_for(stage: str) -> tuple[str, ...]:
    """Return the folders that each rank tries in turn.

    Args:
        stage: the folder of ``--stage``; other words than an absolute path name none.
    """
    return (*([stage] if os.path.isabs(stage) else []), OWN_TMPDIR, "/tmp")  # noqa: S108 - folders there are this user's own


def claim_folder(
    bases: Sequence[str], name: str, environ: Mapping[str, str], ranks: int
) -> tuple[ClaimedFolder | None, str]:
    """Claim a folder below the first base where that can be done: on a disk of this node with room, from which code can be loaded.

    Args:
        bases: the bases. Those that are named are created, as staging would; ``TMPDIR`` isn't.
        name: the folder's name.
        environ: the rank's environment.
        ranks: this node's ranks, which all need room.

    Returns:
        The folder; or None, and why each base is none.
    """
    problems = []
    for given in bases:
        base = environ.get("TMPDIR", "") if given == OWN_TMPDIR else given
        if not os.path.isabs(base):
            continue
        try:
            if given != OWN_TMPDIR:
                make_folder(base, parents=False)
            problem = _problem_of(base, ranks)
            if not problem:
                return claim(base, name), ""
        except UnsafeFileError as error:
            problem = reason(error)
        except OSError as error:
            problem = f"{base}: {reason(error)}"
        problems.append(problem)
    return None, "; ".join(dict.fromkeys(problems))


def _problem_of(base: str, ranks: int) -> str:
    kind = file_system_type(base)
    if is_shared(kind):
        return f"{base} is on a shared file system ({kind})"
    if os.statvfs(base).f_flag & os.ST_NOEXEC:
        return f"{base} is mounted noexec"
    if (free := free_bytes(base)) < ranks * ROOM:
        each = f" for {ranks} ranks" if ranks > 1 else ""
        return f"{base} has too little room: {gib(free)} of {gib(ranks * ROOM)}{each}"
    return ""
