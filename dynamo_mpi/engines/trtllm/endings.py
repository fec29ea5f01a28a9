# SPDX-License-Identifier: Apache-2.0
"""The errors with which a TensorRT-LLM worker ends."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import DiscoveryError, DynamoMpiError, EngineError, PhaseTimeoutError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.engines.trtllm.process import describe_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dynamo_mpi.engines.trtllm.session import Session

_LINES_TOLD = 12
_LOST_WORDS = "Unable to maintain lease"


def stopped(seconds: float, pid: int) -> DynamoMpiError:
    """Say that ``dynamo.trtllm`` has been stopped, as by SIGSTOP, for too long."""
    return PhaseTimeoutError(
        f"dynamo.trtllm has been stopped for {seconds:g} s",
        needed="a process that runs: nobody is answered meanwhile, and its lease in etcd ends",
        fix=f"find out who has stopped process {pid}, a debugger perhaps; --heartbeat-timeout gives it longer",
    )


class ChildExitError(DynamoMpiError):
    """``dynamo.trtllm`` ended and nobody had asked it to, or otherwise than it was asked to.

    Args:
        code: as `subprocess.Popen.returncode` gives it.
        lines: what it wrote last.
        loss: what has become of its lease, where that is lost.
    """

    def __init__(self, code: int, lines: Sequence[str], loss: str = "") -> None:
        found = f"dynamo.trtllm {describe_end(code)}"
        fix = "look at its last lines"
        if code == 0:
            found += " although nobody asked it to"
            fix = "start the worker again; if it comes back, look at who ends it"
            # its runtime's words; one that ends in order gives its lease back, so that etcd alone can't tell
            if loss and any(_LOST_WORDS in line for line in lines):
                found += f": {loss}"
                fix = "start the worker again; if it comes back, look at etcd and the network between"
            elif loss:
                found += f", with a signal of somebody else's, or because its lease was lost ({loss})"
        if lines:
            found += "; its last lines:\n" + "\n".join(f"    {line}" for line in lines[-_LINES_TOLD:])
        super().__init__(found, fix=fix)
        self.code = code
        if code == 0:
            self.exit_code = ExitCode.TEMPORARY


def proof_error(news: Mapping[str, Any], *, registered: bool) -> DynamoMpiError:
    """Return why a worker could not be proven.

    Args:
        news: what the prover wrote.
        registered: it had seen the worker.
    """
    if died := news.get("died"):
        return EngineError(died, fix="start the worker again; if memory ran out on this node, dmesg says so")
    text = news.get("error", news)
    if registered:
        return EngineError(f"the first completion failed: {text}", fix="look at the lines of dynamo.trtllm above")
    return DiscoveryError(
        f"rank 0 can't see whether the worker is registered: {text}",
        needed="etcd, and NATS where it is used, that answer",
        fix="look at both; ETCD_ENDPOINTS and NATS_SERVER say where they are",
    )


@contextmanager
def call_if_late(seconds: float, late: Callable[[], object]) -> Iterator[None]:
    """Call ``late``, from a thread, when the body takes longer."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def close_session(session: Session, seconds: float) -> None:
    """Close the session, which waits for the ranks to end their engine.

    Raises:
        PhaseTimeoutError: it did not close within ``seconds``.
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
        raise PhaseTimeoutError(
            f"the ranks did not leave TensorRT-LLM within {seconds:g} s after dynamo.trtllm had ended",
            needed="ranks that end their engine",
            fix="look at the ranks' logs; the worker is already out of discovery",
        ) from None
    if error is not None:
        raise error
