# SPDX-License-Identifier: Apache-2.0
"""What TensorRT-LLM logs on a rank before it leaves: it tells a failed start, and that it is about to kill all ranks, to its log alone.

Its logger is Python's ``TRT-LLM``; which of its lines mean what is in docs/concepts/trtllm-session.md.
"""

from __future__ import annotations

import collections
import logging
import re
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import EngineError, PhaseTimeoutError
from dynamo_mpi.common.failure import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.errors import DynamoMpiError

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
        fix="look at the traceback that it has logged on this rank",
    )


def _line_of(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # a message that doesn't fit its arguments
        text = str(record.msg)
    line = first_line(_PREFIX.sub("", text))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
