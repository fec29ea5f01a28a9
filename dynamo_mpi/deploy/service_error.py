# SPDX-License-Identifier: Apache-2.0
"""Errors of a stack's or a deployment's processes; each contains the end of the process's log."""

from __future__ import annotations

from dynamo_mpi.common.errors import DynamoMpiError

LOG_LINES = 20


class ServiceError(DynamoMpiError):
    """A process of the stack failed.

    Args:
        found: the problem.
        status: the exit code; any code is possible, as a worker's own is passed on.
        log: the end of its log, to be printed unchanged.
        part: the name of the process.
        needed: what is expected.
        fix: the fix.
    """

    def __init__(self, found: str, *, status: int, log: str, part: str = "", needed: str = "", fix: str = "") -> None:
        super().__init__(found, needed=needed, fix=fix)
        self.part, self.status, self.log = part, status, log


class ProcessExited(ServiceError):
    """A process ended unexpectedly."""


class StartTimeout(ServiceError):
    """A process was not ready in time."""


class StepFailed(ServiceError):
    """A step of a deployment ended, and the deployment with it."""
