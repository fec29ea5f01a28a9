# SPDX-License-Identifier: Apache-2.0
"""How a step that ended ends its deployment."""

from __future__ import annotations

from dynamo_mpi.errors import BootstrapError


class StepFailed(BootstrapError):
    """A step ended, and the deployment with it.

    Args:
        found: which, and how.
        status: its exit code, or ours where it gave none.
        log: the end of its own words.
        needed: what has to be true instead.
        fix: what to do about it.
    """

    def __init__(self, found: str, *, status: int, log: str, needed: str = "", fix: str = "") -> None:
        super().__init__(found, needed=needed, fix=fix)
        self.status, self.log = status, log
