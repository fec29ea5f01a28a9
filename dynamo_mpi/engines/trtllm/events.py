# SPDX-License-Identifier: Apache-2.0
"""The events that rank 0's main thread waits for while a TensorRT-LLM worker runs. Threads put them into a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dynamo_mpi.common.errors import RetryableError


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
