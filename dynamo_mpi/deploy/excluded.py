# SPDX-License-Identifier: Apache-2.0
"""Nodes that a deployment has left out for the rest of its job: ``excluded.json`` in the run folder, and how it is said.

The file stays when the deployment ends, so that a batch script can requeue its job without these nodes. A later start of the same job leaves
them out again; one of another job begins without any.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.common.record_codec import read_fields
from dynamo_mpi.deploy.run_files import EXCLUDED, open_run_dir, read_object, write_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dynamo_mpi.common.own_files import OwnFolder

_SCHEMA = 1


@dataclass(frozen=True)
class ExcludedNode:
    """A node that is left out.

    Args:
        node: its name.
        reason: why.
        time: since when, in seconds since 1970.
        worker: the worker that it was taken from; empty for a spare.
    """

    node: str
    reason: str
    time: float
    worker: str = ""


def read_excluded(folder: OwnFolder, job_id: str) -> tuple[ExcludedNode, ...]:
    """Return what a run folder's file has; empty if there is none, if it makes no sense, or if it is another job's.

    Args:
        folder: the run folder.
        job_id: Slurm's job id, or empty under mpirun, where a further start in the folder forgets it.
    """
    try:
        content = read_object(folder, EXCLUDED) or {}
    except (OSError, ValueError):
        return ()
    if not job_id or str(content.get("job_id")) != job_id:
        return ()
    found = []
    for entry in content.get("nodes") or ():
        with contextlib.suppress(ValueError):
            found.append(read_fields(ExcludedNode, entry, [], needed=("node",)))
    return tuple(found)


def excluded_before(run_dir: Path, job_id: str) -> tuple[ExcludedNode, ...]:
    """Return the nodes that an earlier start of this job in the folder has left out; empty if there is no such folder."""
    if not job_id or not run_dir.is_dir():
        return ()
    with open_run_dir(run_dir) as folder:
        return read_excluded(folder, job_id)


def write_excluded(folder: OwnFolder, job_id: str, nodes: Sequence[ExcludedNode]) -> None:
    """Write the file.

    Raises:
        OSError: it can't be written.
    """
    write_object(folder, EXCLUDED, {"schema": _SCHEMA, "job_id": job_id, "nodes": [asdict(node) for node in nodes]})


def exclude(node: str, reason: str, worker: str = "") -> ExcludedNode:
    """Return the entry of a node that is left out from now on."""
    return ExcludedNode(node, reason, time.time(), worker)


def describe_excluded(nodes: Sequence[ExcludedNode], hostfile: Path | None = None) -> str:
    """Return a line about nodes that were left out, with what keeps them out of a next job; empty if there are none."""
    if not nodes:
        return ""
    listed = "; ".join(f"{each.node} ({each.reason})" for each in nodes)
    return f"left out: {listed}; {for_next_job([each.node for each in nodes], hostfile)}"


def for_next_job(nodes: Sequence[str], hostfile: object = None) -> str:
    """Return what keeps nodes out of a next job: Slurm's option, or with mpirun an edit of the hostfile."""
    if hostfile is not None:
        return f"for a next launch: take {', '.join(nodes)} out of {hostfile}"
    return f"for a next job: --exclude={','.join(nodes)}"
