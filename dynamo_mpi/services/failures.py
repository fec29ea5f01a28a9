# SPDX-License-Identifier: Apache-2.0
"""Errors of a stack's processes; each carries the end of the process's own log."""

from __future__ import annotations

from dynamo_mpi.errors import BootstrapError

LOG_LINES = 20


class ServiceError(BootstrapError):
    """A process of the stack failed.

    Args:
        found: what happened.
        part: the name of the process.
        status: what to exit with; any code, as a worker's own is passed on.
        log: the end of its log, to be printed as it is.
        fix: what to do about it.
    """

    def __init__(self, found: str, *, part: str, status: int, log: str, fix: str = "") -> None:
        super().__init__(found, fix=fix)
        self.part, self.status, self.log = part, status, log


class ProcessExited(ServiceError):
    """A process ended that must go on."""


class StartTimeout(ServiceError):
    """A process was not ready in time."""
