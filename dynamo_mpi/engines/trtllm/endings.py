# SPDX-License-Identifier: Apache-2.0
"""The ways in which a TensorRT-LLM worker ends otherwise than by itself and in order."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.engines.trtllm.child import describe_end
from dynamo_mpi.errors import BootstrapError, DeadlineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.engines.trtllm.session import Session

_LINES_TOLD = 12


def stopped(seconds: float, pid: int) -> BootstrapError:
    """Say that ``dynamo.trtllm`` has been stopped, as by SIGSTOP, for too long."""
    return DeadlineError(
        f"dynamo.trtllm has been stopped for {seconds:g} s",
        needed="a process that runs: nobody is answered meanwhile, and its lease in etcd ends",
        fix=f"find out who has stopped process {pid}, a debugger perhaps; --heartbeat-timeout gives it longer",
    )


class EndedError(BootstrapError):
    """``dynamo.trtllm`` ended and nobody had asked it to, or otherwise than it was asked to.

    Args:
        code: as `subprocess.Popen.returncode` gives it.
        lines: what it wrote last.
    """

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        found = f"dynamo.trtllm {describe_end(code)}"
        fix = "look at its last lines"
        if code == 0:
            found += " although nobody asked it to: it does so when its lease in etcd is lost"
            fix = "start the worker again; if it comes back, look at etcd and the network between"
        if lines:
            found += "; its last lines:\n" + "\n".join(f"    {line}" for line in lines[-_LINES_TOLD:])
        super().__init__(found, fix=fix)
        self.code = code


def close_session(session: Session, seconds: float) -> None:
    """Close the session, which waits for the ranks to end their engine.

    Raises:
        DeadlineError: it did not close within ``seconds``.
        Exception: what closing it has raised.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def close() -> None:
        try:
            session.close()
        except BaseException as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=close, name="close", daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise DeadlineError(
            f"the ranks did not leave TensorRT-LLM within {seconds:g} s after dynamo.trtllm had ended",
            needed="ranks that end their engine",
            fix="look at the ranks' logs; the worker is already out of discovery",
        ) from None
    if error is not None:
        raise error
