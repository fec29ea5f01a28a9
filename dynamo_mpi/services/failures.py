# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a part, as an error that carries the part's own words."""

from __future__ import annotations

from dynamo_mpi.errors import BootstrapError

LOG_LINES = 20


class PartError(BootstrapError):
    """A part failed.

    Args:
        part: its name.
        status: what to exit with; any code, for a worker's own is passed on.
        log: the part's own words, to be printed as they are.
    """

    def __init__(self, found: str, *, part: str, status: int, log: str, fix: str = "") -> None:
        super().__init__(found, fix=fix)
        self.part, self.status, self.log = part, status, log
