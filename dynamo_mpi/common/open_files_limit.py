# SPDX-License-Identifier: Apache-2.0
"""Raises the limit of open files: rank 0 needs one connection per rank, besides those for serving."""

from __future__ import annotations

import contextlib
import resource

from dynamo_mpi.common.errors import UsageError

SERVING_FILES = 256
"""Files that rank 0 opens besides the connections to the ranks: the engine's libraries, etcd, Dynamo's runtime, clients."""


def raise_nofile_limit(connections: int) -> None:
    """Raise this process's soft limit of open files if it is too low for ``connections``.

    Raises:
        UsageError: the hard limit is too low.
    """
    needed = connections + SERVING_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        with contextlib.suppress(OSError, ValueError):  # then the kernel's limit is lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            return
    raise UsageError(
        f"rank 0 may have {hard} files open",
        needed=f"{needed}: a connection to each of the other ranks, and files for serving",
        fix=f"raise the limit on rank 0's node: ulimit -n {needed} where the ranks are started, LimitNOFILE= of slurmd's unit (srun's "
        "--propagate=NOFILE hands on the submitting shell's), --ulimit nofile of a container",
    )
