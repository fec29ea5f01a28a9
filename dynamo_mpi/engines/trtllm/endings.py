# SPDX-License-Identifier: Apache-2.0
"""How a TensorRT-LLM worker ends: the events that rank 0's main thread waits for while it runs, and the errors."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import (
    DiscoveryError,
    DynamoMpiError,
    EngineError,
    ExitCode,
    PhaseTimeoutError,
    RetryableError,
)
from dynamo_mpi.common.failure import is_secondary
from dynamo_mpi.engines.trtllm.process import describe_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.engines.trtllm.session import Session
    from dynamo_mpi.engines.trtllm.task import TaskEnd


class ChildExited(NamedTuple):
    """The child has exited: its code as in `subprocess.Popen.returncode`, and its last output lines."""

    code: int
    lines: list[str]


class SignalReceived(NamedTuple):
    """A shutdown is requested by a signal, or, as SIGUSR2, by the job's time limit."""

    number: int


class LeaseLost(NamedTuple):
    """The worker's lease is lost."""

    error: RetryableError


class Registered(NamedTuple):
    """The worker is registered."""


class FirstCompletion(NamedTuple):
    """The worker has answered its first completion."""


Event = ChildExited | SignalReceived | LeaseLost | Registered | FirstCompletion


_REPORTED_LINES = 12
_LEASE_LOST_TEXT = "Unable to maintain lease"


def stopped(seconds: float, pid: int) -> DynamoMpiError:
    """Return the error for a ``dynamo.trtllm`` that has been stopped (SIGSTOP) for too long."""
    return PhaseTimeoutError(
        f"dynamo.trtllm has been stopped for {seconds:g} s",
        expected="a running process: while it is stopped it answers no request, and its lease in etcd expires",
        fix=f"find out what stopped process {pid}, perhaps a debugger; --heartbeat-timeout sets the time",
    )


class ChildExitError(DynamoMpiError):
    """``dynamo.trtllm`` exited without being asked to, or with an error.

    Args:
        code: as `subprocess.Popen.returncode` gives it.
        lines: its last output lines.
        loss: why its lease is lost; empty if it isn't.
        reason: the cause; empty if it isn't known.
    """

    def __init__(self, code: int, lines: Sequence[str], loss: str = "", reason: str = "") -> None:
        found = f"dynamo.trtllm {describe_end(code)}"
        fix = "look at its last lines"
        if code > 0 and reason:
            found += f": {reason}"
        elif code == 0:
            found += " although it was not asked to end"
            fix = "start the worker again; if it happens again, find out what ends it"
            # by its runtime's output: an orderly exit revokes the lease too, so etcd's state alone is not enough
            if loss and any(_LEASE_LOST_TEXT in line for line in lines):
                found += f": {loss}"
                fix = "start the worker again; if it happens again, check etcd and the network to it"
            elif loss:
                found += f", after a signal of another process, or because its lease was lost ({loss})"
        if lines:
            found += "; its last lines:\n" + "\n".join(f"    {line}" for line in lines[-_REPORTED_LINES:])
        super().__init__(found, fix=fix)
        self.code = code
        if code == 0:
            self.exit_code = ExitCode.TEMPORARY


_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_TRACEBACK = "Traceback (most recent call last):"


def innermost_error(lines: Sequence[str]) -> str:
    """Return the error at the beginning of the last chain of tracebacks: TensorRT-LLM wraps the cause of a failed start into
    ``RuntimeError: Executor worker returned error``.

    Args:
        lines: a process's output.

    Returns:
        The last line of that error; empty if the lines hold no chain.
    """
    found = ""
    at = len(lines)
    while (at := _last_link(lines, at)) >= 0:
        error = next((line for line in reversed(lines[:at]) if line.strip()), "")
        found = error.strip() or found
        between = [line for line in lines[_last_link(lines, at) + 1 : at] if line.strip()]
        # otherwise the chain begins here
        if not between or between[0].strip() != _TRACEBACK or between.count(_TRACEBACK) > 1:
            break
    return found


def _last_link(lines: Sequence[str], end: int) -> int:
    return next((at for at in range(end - 1, -1, -1) if lines[at].strip() in _CHAINED), -1)


def ranks_left(ends: Sequence[TaskEnd], name: Callable[[Sequence[int]], str]) -> DynamoMpiError:
    """Return the error for ranks that have left TensorRT-LLM's worker while ``dynamo.trtllm`` goes on.

    Args:
        ends: the ranks, in the order in which they left.
        name: returns the names of ranks with their hosts.
    """
    reason = why_left(ends, name)
    return EngineError(
        f"{name(sorted(end.rank for end in ends))} left TensorRT-LLM's worker while dynamo.trtllm goes on"
        + (f": {reason}" if reason else ""),
        expected="all ranks in it until dynamo.trtllm ends",
        fix="look at the traceback that TensorRT-LLM has logged there: it logs such an error and returns",
    )


def why_left(ends: Sequence[TaskEnd], name: Callable[[Sequence[int]], str]) -> str:
    """Return the first error that ranks logged before they left, and where, unless it follows from another's; empty if none did."""
    said = [end for end in ends if end.reason]
    first = next((end for end in said if not is_secondary(end.reason)), said[0] if said else None)
    return "" if first is None else f"{name([first.rank])} logged: {first.reason}"


def readiness_error(message: Mapping[str, Any], *, registered: bool) -> DynamoMpiError:
    """Return the error of a readiness probe that failed.

    Args:
        message: the probe's last message.
        registered: whether the probe had found the worker's registration.
    """
    if died := message.get("died"):
        return EngineError(
            died,
            expected="an answer of the readiness probe",
            fix="start the worker again; check dmesg for a lack of memory on this node",
        )
    text = message.get("error", message)
    if registered:
        return EngineError(
            f"the first completion failed: {text}",
            expected="a completion of two tokens",
            fix="look at the lines of dynamo.trtllm above",
        )
    return DiscoveryError(
        f"rank 0 can't find out whether the worker is registered: {text}",
        expected="etcd, and NATS if it is used, must answer",
        fix="check both; ETCD_ENDPOINTS and NATS_SERVER are their addresses",
    )


def close_session(session: Session, seconds: float) -> None:
    """Close the session, which waits for the ranks to end their engine.

    Raises:
        PhaseTimeoutError: it did not close within ``seconds``.
        Exception: the error of closing it.
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
            expected="all ranks must shut down their engine",
            fix="look at the ranks' logs; the worker is already deregistered",
        ) from None
    if error is not None:
        raise error
