# SPDX-License-Identifier: Apache-2.0
"""The command line of a process that is killed when its parent dies; see `pdeathsig`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_TETHER = Path(__file__).with_name("pdeathsig.py")


def with_pdeathsig(
    command: Sequence[str],
    *,
    parent: int | None = None,
    rank_logs: Path | None = None,
    end_with: signal.Signals = signal.SIGKILL,
) -> tuple[str, ...]:
    """Return the command line that runs ``command`` so that it is killed when its parent exits.

    Args:
        command: the command.
        parent: the parent's process id, if it is known in advance; avoids a race at the start.
        rank_logs: directory for one log per MPI rank.
        end_with: the signal that it gets then.
    """
    words = [sys.executable, "-I", "-S", str(_TETHER)]
    if parent is not None:
        words += ["--parent", str(parent)]
    if end_with is not signal.SIGKILL:
        words += ["--signal", str(int(end_with))]
    if rank_logs is not None:
        words += ["--rank-logs", str(rank_logs)]
    return (*words, "--", *command)
