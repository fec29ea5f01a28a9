# SPDX-License-Identifier: Apache-2.0
"""Failures of ranks: data, root cause, and description. Pure."""

from __future__ import annotations

import signal
import traceback
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST_CONSEQUENCES = 8
_LONGEST_LINE = 200
# what an engine says when another rank has gone
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
    """How a failure became known; a greater one is less likely to be the first of several."""

    REPORT = 0
    """The rank said so itself."""
    DISCONNECT = 1
    """Its connection closed without a word."""
    HOST_UNREACHABLE = 2
    """Its host answers no longer."""
    HEARTBEAT = 3
    """It is there, and says nothing."""
    SIGNAL = 4
    """Rank 0 was told to stop."""


class Failure(NamedTuple):
    """Why the world can't go on.

    Args:
        rank: where.
        exit_code: what every rank is to leave with.
        text: for the user.
        cause: how it became known.
        phase: what that rank was doing; empty where it isn't known.
        at: when it became known, in seconds of rank 0's monotonic clock.
        sequence: counts what this rank has told.
    """

    rank: int
    exit_code: int
    text: str
    cause: DetectedBy = DetectedBy.REPORT
    phase: str = ""
    at: float = 0.0
    sequence: int = 0


class TerminatedBySignal(DynamoMpiError):
    """A signal that leaves no time for an orderly end."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}, which the launcher sends when a rank has died, and an operator to stop")
        self.number = number


def describe_error(error: BaseException) -> tuple[str, int]:
    """Return what to tell of an error, and the exit code: a traceback unless we know what it means."""
    if isinstance(error, DynamoMpiError):
        return str(error), int(error.exit_code)
    return "".join(traceback.format_exception(error)).rstrip(), int(ExitCode.ENGINE)


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that the others follow from: the earliest, but for two things that a death brings with it sooner than it is seen.

    These are the launcher's signal to rank 0, and an engine's complaint that its peer has gone.

    Args:
        failures: at least one, in the order in which they became known.
    """
    deaths = [failure for failure in failures if failure.cause in (DetectedBy.DISCONNECT, DetectedBy.HOST_UNREACHABLE)]
    first = failures[0]
    if first.cause is DetectedBy.SIGNAL:
        return next((failure for failure in failures if failure.cause is not DetectedBy.SIGNAL), first)
    if deaths and first.cause is DetectedBy.REPORT and _is_echo(first.text):
        return deaths[0]
    return first


def _is_echo(text: str) -> bool:
    last = text.rstrip().rpartition("\n")[2].lower()
    return any(word in last for word in _SECONDARY_ERRORS)


def describe_consequences(first: Failure, failures: Sequence[Failure], name: Callable[[Sequence[int]], str]) -> str:
    """Put what followed the first failure on a line for each kind of it.

    Args:
        first: the one that is told in full.
        failures: all.
        name: names ranks with their hosts.
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
    """Return a traceback's last line, which names the error, or else a text's first."""
    lines = text.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def in_short(text: str) -> str:
    """Return `first_line`, as far as it isn't too long."""
    line = first_line(text)
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"
