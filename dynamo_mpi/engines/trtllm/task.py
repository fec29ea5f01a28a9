# SPDX-License-Identifier: Apache-2.0
"""A task of TensorRT-LLM's session on one rank: all ranks begin it together, and failures are reported before any rank waits.

The task travels to the ranks as an object of this module, which is loaded in each of them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

_POLL_SECONDS = 0.005


class _RankContext(NamedTuple):
    """What this process knows of its place."""

    comm: MPI.Intracomm
    abort: Callable[[BaseException], None]


# a task is loaded from bytes and finds its place here; set once, before the first
_context: list[_RankContext] = []


def install(comm: MPI.Intracomm, abort: Callable[[BaseException], None]) -> None:
    """Prepare this rank for tasks.

    Args:
        comm: all ranks, for the tasks' own barrier.
        abort: called with what a task has raised. The world is to end of it, so it doesn't return.
    """
    _context[:] = [_RankContext(comm, abort)]


class Task:
    """Wraps what the child wants to be run; picklable where that is.

    Args:
        function: what to run on every rank.
        keeps_result: return what it returns; else the rank, which tells who has ended.
    """

    def __init__(self, function: Callable[..., Any], *, keeps_result: bool) -> None:
        self.function, self.keeps_result = function, keeps_result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it once all ranks have one: an executor would give an idle rank the task of a slow one as well."""
        comm, abort = _context[0]
        try:
            started = comm.Ibarrier()
            while not started.Test():
                time.sleep(_POLL_SECONDS)
            result = self.function(*args, **kwargs)
            return result if self.keeps_result else comm.Get_rank()
        except BaseException as error:
            # Rank 0 sits in this task too, and the others in collectives that this rank will never join.
            abort(error)
            raise
