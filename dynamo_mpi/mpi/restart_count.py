# SPDX-License-Identifier: Apache-2.0
"""The number of restarts of this worker. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "DYN_MPI_ATTEMPT"
"""The variable that a program which restarts a worker sets: 1 for the first start."""
_REQUEUED = "SLURM_RESTART_COUNT"
_MOST = 10**6


def restart_count(environ: Mapping[str, str]) -> int:
    """Return the number of this start: the count of `VARIABLE`, plus one for each time that Slurm has requeued the job."""
    return starts_before(environ) + 1 + _count(environ, _REQUEUED)


def starts_before(environ: Mapping[str, str]) -> int:
    """Return the number of earlier starts by the program that started this worker."""
    return max(1, _count(environ, VARIABLE)) - 1


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    # an invalid number is ignored
    return min(int(text), _MOST) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
