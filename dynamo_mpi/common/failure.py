# SPDX-License-Identifier: Apache-2.0
"""Failures of ranks: data, root cause, and description. Pure."""

from __future__ import annotations

import signal
from enum import IntEnum

from dynamo_mpi.common.errors import DynamoMpiError, ExitCode
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.common.os_errors import is_folder_gone, of_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST_CONSEQUENCES = 8
_LONGEST_LINE = 200
# errors of an engine after the loss of another rank
_SECONDARY_ERRORS = (
    "connection reset",
    "connection closed",
    "connection refused",
    "broken pipe",
    "mpi_err",
    "remote process",
    "nccl",
    "eof",
)


class DetectedBy(IntEnum):
    """How a failure was detected; a greater value is less likely to be the root cause of several failures."""

    REPORT = 0
    """The rank reported it."""
    DISCONNECT = 1
    """The rank's connection closed without a report."""
    HOST_UNREACHABLE = 2
    """The rank's host doesn't answer."""
    HEARTBEAT = 3
    """The rank sends no heartbeats."""
    SIGNAL = 4
    """Rank 0 got a signal to stop."""


class Failure(NamedTuple):
    """A failure that ends the world.

    Args:
        rank: the rank that failed.
        exit_code: the exit code for every rank.
        text: the error or traceback.
        cause: how it was detected.
        phase: the rank's phase; empty if it isn't known.
        at: when it was detected, in seconds of rank 0's monotonic clock.
        sequence: counts this rank's reports.
    """

    rank: int
    exit_code: int
    text: str
    cause: DetectedBy = DetectedBy.REPORT
    phase: str = ""
    at: float = 0.0
    sequence: int = 0


class TerminatedBySignal(DynamoMpiError):
    """A signal that ends the world without an orderly shutdown."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}, which the launcher sends when a rank has died, and an operator to stop")
        self.number = number


def describe_error(error: BaseException) -> tuple[str, int]:
    """Return an error's text and exit code; the text is a traceback unless it is a `DynamoMpiError`."""
    if isinstance(error, DynamoMpiError):
        return str(error), int(error.exit_code)
    if isinstance(error, OSError) and is_folder_gone(error):
        return describe_error(of_os_error(error))
    return format_traceback(error), int(ExitCode.ENGINE)


def format_traceback(error: BaseException) -> str:
    """Return an error's traceback, or only the error if nothing can be imported any more, as without free file descriptors."""
    try:
        # not before a failure: it takes milliseconds, and every rank imports this module before the preflight result
        from traceback import format_exception
    except (ImportError, OSError):
        return f"{type(error).__name__}: {error}"
    return "".join(format_exception(error)).rstrip()


ENDED_BY_MPI = "Open MPI ended it, as it does with ranks whose connection to another closes"
# wait status of a rank that Open MPI 5's own error handler ends: exit code 14, seen with 5.0.7 and 5.0.11
OPEN_MPI_ABORT = 14 << 8


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that caused the others: the earliest one, except for three consequences that may be detected before a death.

    These are the launcher's signal to rank 0, an engine's error about a lost peer, and Open MPI's end of a rank whose peer is lost.

    Args:
        failures: at least one failure, in the order of detection.
    """
    deaths = [failure for failure in failures if failure.cause in (DetectedBy.DISCONNECT, DetectedBy.HOST_UNREACHABLE)]
    first = failures[0]
    if first.cause is DetectedBy.SIGNAL:
        return next((failure for failure in failures if failure.cause is not DetectedBy.SIGNAL), first)
    if deaths and first.cause is DetectedBy.REPORT and is_secondary(first.text):
        return deaths[0]
    if ENDED_BY_MPI in first.text:
        return next((failure for failure in deaths if ENDED_BY_MPI not in failure.text), first)
    return first


def is_secondary(text: str) -> bool:
    """Return whether an engine's error is one that follows from the loss of another rank."""
    last = text.rstrip().rpartition("\n")[2].lower()
    return any(word in last for word in _SECONDARY_ERRORS)


def describe_consequences(first: Failure, failures: Sequence[Failure], name: Callable[[Sequence[int]], str]) -> str:
    """Describe the consequences of the first failure, one line for each kind.

    Args:
        first: the root cause.
        failures: all failures.
        name: returns the names of ranks with their hosts.
    """
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        if failure is not first:
            groups.setdefault(in_short(failure.text), []).append(failure)
    lines = []
    for text, group in groups.items():
        later = min(failure.at for failure in group) - first.at
        ranks = sorted({failure.rank for failure in group})
        lines.append(f"    {name(ranks)}, {max(0.0, later):.2f} s later: {text}")
    if len(lines) > _MOST_CONSEQUENCES:
        lines[_MOST_CONSEQUENCES - 1 :] = [f"    and {len(lines) - _MOST_CONSEQUENCES + 1} others"]
    return "\n".join(["  what followed from it:", *lines]) if lines else ""


def first_line(text: str) -> str:
    """Return a traceback's last line, which names the error, or another text's first line."""
    lines = text.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def in_short(text: str) -> str:
    """Return `first_line`, cut to a limited length."""
    line = first_line(text)
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"
