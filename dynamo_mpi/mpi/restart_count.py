# SPDX-License-Identifier: Apache-2.0
"""The number of restarts of this worker. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "DYN_MPI_ATTEMPT"
"""What whoever starts a worker again says: 1 for the first start."""
_REQUEUED = "SLURM_RESTART_COUNT"
_MOST = 10**6


def restart_count(environ: Mapping[str, str]) -> int:
    """Return the number of this start: the starter's count, and one more for each time that Slurm has begun the job anew."""
    return starts_before(environ) + 1 + _count(environ, _REQUEUED)


def starts_before(environ: Mapping[str, str]) -> int:
    """Return how often whoever started us had done so before, as it says."""
    return max(1, _count(environ, VARIABLE)) - 1


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    # what is no number says nothing, and is no reason not to start
    return min(int(text), _MOST) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
