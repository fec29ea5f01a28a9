# SPDX-License-Identifier: Apache-2.0
"""Where a timeline stands. Imports nothing of ours: rank 0 needs it before the verdict."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def trace_path(path: Path) -> Path:
    """Return where the trace of a page stands."""
    return path.with_suffix(".trace.json")


def forget_timeline(path: Path) -> None:
    """Remove what an earlier start has left: it would be taken for this one's."""
    for stale in (path, trace_path(path)):
        with contextlib.suppress(OSError):
            stale.unlink()
