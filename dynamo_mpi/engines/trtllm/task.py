# SPDX-License-Identifier: Apache-2.0
"""A task of TensorRT-LLM's session on one rank, and what a rank needs before it imports TensorRT-LLM.

The task is sent to the ranks as an object of this module, which each rank imports.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.engines.trtllm.engine_log import EngineErrors
from dynamo_mpi.engines.trtllm.flashinfer import claim_workspace
from dynamo_mpi.mpi.placement import spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from dynamo_mpi.mpi.world import World


def prepare_rank(world: World, warn: Callable[[str], object]) -> None:
    """Set the variables that TensorRT-LLM's own launcher sets for a rank, unless the user has set them. Collective.

    Args:
        world: all ranks.
        warn: called on rank 0, with one warning for all ranks that have the same to say.

    Raises:
        EngineError: this rank has no folder for compiled kernels.
    """
    # with it, the ranks of this world would ignore each other
    os.environ.pop("TLLM_DISABLE_MPI", None)
    ranks: dict[str, list[int]] = {}
    for rank, warning in enumerate(world.gather(claim_workspace(world.rank, world.size, os.environ).encode())):
        ranks.setdefault(warning.decode(), []).append(rank)
    for text, those in ranks.items():
        if text:
            warn(f"{'ranks' if len(those) > 1 else 'rank'} {spans(those)}: {text}")


def take_own_gpu(rank: int) -> None:
    """Make this rank's GPU (K9) the current one if TensorRT-LLM has imported torch: loading a task from bytes may use a GPU, which would
    otherwise be the node's first."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


_POLL_SECONDS = 0.005


class TaskEnd(NamedTuple):
    """A task has ended on a rank.

    Args:
        rank: the rank.
        reason: what TensorRT-LLM has logged there as an error; empty if nothing.
    """

    rank: int
    reason: str


class _RankContext(NamedTuple):
    """This rank's communicator, abort function, and listener for the engine's errors."""

    comm: MPI.Intracomm
    abort: Callable[[BaseException], object]
    errors: EngineErrors


# a task that is loaded from bytes finds its context here; set once, before the first task
_context: list[_RankContext] = []


def install(comm: MPI.Intracomm, abort: Callable[[BaseException], object]) -> None:
    """Prepare this rank for tasks.

    Args:
        comm: a communicator of all ranks for the tasks' barrier.
        abort: called with the exception of a task, or when the engine is about to kill all ranks. It ends the world and doesn't return.
    """
    _context[:] = [_RankContext(comm, abort, EngineErrors(abort))]


class Task:
    """Wraps a function that the child sends; picklable if the function is.

    Args:
        function: the function to run on every rank.
        keeps_result: whether to return its result; otherwise a `TaskEnd` is returned.
    """

    def __init__(self, function: Callable[..., Any], *, keeps_result: bool) -> None:
        self.function, self.keeps_result = function, keeps_result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function after all ranks have a task: an executor would give an idle rank the task of a slow one as well."""
        comm, abort, errors = _context[0]
        # TensorRT-LLM has been imported, and its logger has been made
        errors.attach()
        try:
            started = comm.Ibarrier()
            while not started.Test():
                time.sleep(_POLL_SECONDS)
            result = self.function(*args, **kwargs)
            return result if self.keeps_result else TaskEnd(comm.Get_rank(), errors.reason())
        except BaseException as error:
            # rank 0 is in this task too, and the others are in collectives that this rank will never join
            abort(error)
            raise
