# SPDX-License-Identifier: Apache-2.0
"""A task of TensorRT-LLM's session on one rank, and what a rank needs before it imports TensorRT-LLM.

The task is sent to the ranks as an object of this module, which each rank imports. TensorRT-LLM reports a failed start, and that it is about
to kill all ranks, to its log alone, Python's ``TRT-LLM``: docs/concepts/trtllm-session.md has which of its lines mean what.
"""

from __future__ import annotations

import collections
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import EngineError, PhaseTimeoutError
from dynamo_mpi.common.failure import first_line
from dynamo_mpi.engines.trtllm.flashinfer import claim_workspace
from dynamo_mpi.mpi.placement import spans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.mpi.world import World

_LOGGER = "TRT-LLM"
_PREFIX = re.compile(r"\A(\[[^\]\n]*\]\s*)+")
_LONGEST = 500
_KEPT = 12
_NOT_STARTED = "Failed to initialize executor on rank"
# the last words before MPI_Abort with 137, or SIGKILL of itself
_KILLS = ("propagating hard-kill", "self-SIGKILL")
_HANG = "Hang detected"
# what it logs of each of its threads then
_STACK = re.compile(r"Thread \S+ ")


class EngineErrors(logging.Handler):
    """Keeps the errors that TensorRT-LLM logs in this process.

    Args:
        on_kill: called with an error when TensorRT-LLM is about to kill all ranks, before it does, in the thread that will. It may end the
            world and not return.
    """

    def __init__(self, on_kill: Callable[[DynamoMpiError], object]) -> None:
        super().__init__(logging.ERROR)
        self._on_kill = on_kill
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT)
        self._not_started = self._hang = ""

    def attach(self) -> None:
        """Listen from now on. Idempotent."""
        logging.getLogger(_LOGGER).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line of an error."""
        line = _line_of(record)
        if _STACK.match(line):
            return
        self._lines.append(line)
        if line.startswith(_NOT_STARTED) and not self._not_started:
            self._not_started = line
        if _HANG in line:
            self._hang = line
        if any(words in line for words in _KILLS):
            lines = list(self._lines)
            # more may have been logged since than is kept
            self._on_kill(kill_error([self._hang, *lines] if self._hang and self._hang not in lines else lines))

    def reason(self) -> str:
        """Return why this rank could not start, or else the last error; empty if there is none."""
        return self._not_started or (self._lines[-1] if self._lines else "")


def kill_error(lines: Sequence[str]) -> DynamoMpiError:
    """Return the error for a rank that TensorRT-LLM's own hard kill ends.

    Args:
        lines: the last errors, the announcement last.
    """
    last = "\n".join(f"    {line}" for line in lines)
    if any(_HANG in line for line in lines):
        return PhaseTimeoutError(
            f"TensorRT-LLM found its own loop hanging and kills all ranks; its last errors:\n{last}",
            expected="a step within TLLM_HANG_DETECTION_TIMEOUT_S",
            fix="look at the stacks that it has logged on each rank; TLLM_HANG_DETECTOR_PRE_KILL_DELAY_S leaves time for a debugger",
        )
    return EngineError(
        f"TensorRT-LLM's loop crashed and kills all ranks; its last errors:\n{last}",
        expected="an executor loop without exceptions",
        fix="look at the traceback that it has logged on this rank",
    )


def _line_of(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # a message that doesn't fit its arguments
        text = str(record.msg)
    line = first_line(_PREFIX.sub("", text))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


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
