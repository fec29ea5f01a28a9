# SPDX-License-Identifier: Apache-2.0
"""The events that rank 0's main thread waits for while a TensorRT-LLM worker runs. Threads put them into a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import RetryableError


class ChildExited(NamedTuple):
    """The child has ended: its code as `subprocess.Popen.returncode` gives it, and the last lines that it wrote."""

    code: int
    lines: list[str]


class SignalReceived(NamedTuple):
    """Somebody wants an end: a signal, or, as SIGUSR1, the end of the job's time."""

    number: int


class LeaseLost(NamedTuple):
    """The worker's lease is lost."""

    error: RetryableError


class Registered(NamedTuple):
    """It is in discovery."""


class FirstCompletion(NamedTuple):
    """It has answered a completion."""


Event = ChildExited | SignalReceived | LeaseLost | Registered | FirstCompletion
