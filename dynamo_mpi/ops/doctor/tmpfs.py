# SPDX-License-Identifier: Apache-2.0
"""Doctor's check of Slurm's TmpFS. MPI keeps the session of a step with ``--mpi=pmix`` there (or in mpi.conf's PMIxCliTmpDirBase), whatever
TMPDIR is, and MPI_Init fails where it can't: in a container of enroot's, whose root is read-only, anywhere but in a mount."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy.pyxis import UserOptions, read_user_options
from dynamo_mpi.deploy.settings import to_words
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.ops.doctor.check import Check, Context, error, ok, skipped, warning
from dynamo_mpi.ops.doctor.commands import find, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# file systems of each container's own, which enroot mounts
_PRIVATE = ("/tmp", "/run", "/var/run", "/var/lock", "/dev/shm")  # noqa: S108 - nothing is written there
_BASE = re.compile(r"^PMIxCliTmpDirBase\s*= *(?!\(null\))(\S+)", re.MULTILINE)
_TMPFS = re.compile(r"^TmpFS\s*= *(\S+)", re.MULTILINE)
_NEEDED = (
    "a folder that can be written: with --mpi=pmix MPI keeps its session in Slurm's TmpFS, and MPI_Init fails otherwise"
)


def check_tmpfs(context: Context) -> Iterator[Check]:
    """Check the folder in a rank, and on a host from which containers are launched."""
    path = find("scontrol", context.environ)
    output = run([path, "show", "config"], context.environ, context.left()) if path is not None else None
    folder = read_tmpfs(output.text) if output is not None else ""
    why = "scontrol isn't on PATH" if output is None else output.problem or "scontrol show config doesn't name it"
    if context.in_rank:
        if context.launch.launcher is Launcher.SLURM_PMIX:
            node = context.environ.get("SLURMD_NODENAME", "")
            place = folder.replace("%n", node).replace("%h", os.uname().nodename.partition(".")[0])
            yield judge_in_rank(place, can_make(place), is_root_read_only(), why)
    elif folder and context.environ.get("IMAGE"):
        yield judge_for_image(folder, context.environ)


def read_tmpfs(text: str) -> str:
    """Read TmpFS, or what is set in its place, from ``scontrol show config``; empty if neither is there."""
    match = _BASE.search(text) or _TMPFS.search(text)
    return match[1] if match else ""


def can_make(folder: str) -> bool:
    """Return whether a folder can be written, or made."""
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return bool(folder) and os.access(folder, os.W_OK | os.X_OK)


def is_root_read_only() -> bool:
    """Return whether the root file system is mounted read-only."""
    return bool(os.statvfs("/").f_flag & os.ST_RDONLY)


def judge_in_rank(folder: str, writable: bool, read_only: bool, why: str) -> Check:
    """Evaluate the folder in a rank.

    Args:
        folder: TmpFS here; empty if it isn't known.
        writable: whether it can be written or made.
        read_only: whether the root file system is read-only.
        why: why it isn't known.
    """
    if not folder:
        unknown = f"Slurm's TmpFS isn't known here ({why}); the root file system is "
        if not read_only:
            return skipped("tmpfs", f"{unknown}writable")
        return skipped(
            "tmpfs",
            f"{unknown}read-only",
            "on the host: scontrol show config | grep TmpFS; if that isn't in /tmp, mount it or --container-writable",
        )
    if writable:
        return ok("tmpfs", f"{folder} (Slurm's TmpFS) can be written")
    return error("tmpfs", f"{folder} (Slurm's TmpFS) can't be written here", _NEEDED, _fix(folder))


def judge_for_image(folder: str, environ: Mapping[str, str]) -> Check:
    """Evaluate the folder for a deployment with an image.

    Args:
        folder: TmpFS, with ``%h`` and ``%n`` for a node's names.
        environ: has the deployment's settings.
    """
    fixed = re.split("%[hn]", folder)[0]
    given = _read_srun_args(environ)
    mounts = filter(None, [*environ.get("MOUNTS", "").split(","), *given.mounts])
    # a mount without a second part is at the same path
    targets = [(part.split(":") * 2)[1] for part in mounts]
    if any(_is_below(fixed, place) for place in (*_PRIVATE, *targets)):
        return ok("tmpfs", f"Slurm's TmpFS is {folder}, which steps in a container can write")
    if "--container-writable" in given.words:
        return ok("tmpfs", f"Slurm's TmpFS is {folder}, and --container-writable lets steps make it")
    return warning("tmpfs", f"Slurm's TmpFS is {folder}, which no mount gives to containers", _NEEDED, _fix(fixed))


def _read_srun_args(environ: Mapping[str, str]) -> UserOptions:
    """Read what `dynamo-mpi launch` merges with the image and its mounts; nothing where it refuses the words, and says why."""
    try:
        return read_user_options(to_words(environ.get("SRUN_ARGS", "")), environ.get("IMAGE", ""), environ)
    except (UsageError, ValueError):
        return UserOptions((), (), ())


def _is_below(folder: str, place: str) -> bool:
    return f"{folder}/".startswith(f"{place.rstrip('/')}/")


def _fix(folder: str) -> str:
    place = folder.rstrip("/")
    return f"add {place}:{place} to MOUNTS, or --container-writable to SRUN_ARGS"
