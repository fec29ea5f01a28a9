# SPDX-License-Identifier: Apache-2.0
"""A worker that serves says so: a line for its user, and the ready file for scripts."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from dynamo_mpi.launchers.attempt import attempt_of

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import RankLogger


def announce(
    settings: Settings,
    phases: Phases,
    log: RankLogger,
    *,
    ranks: int,
    verdict_seconds: float,
    system: str | None = None,
) -> None:
    """Tell that requests are answered now.

    Args:
        settings: the worker's.
        phases: how long each took.
        log: rank 0's.
        ranks: of the world.
        verdict_seconds: from the start to the verdict.
        system: URL of /health, /live and /metrics, where they are served.
    """
    seconds = phases.durations
    # TensorRT-LLM's worker registers before it can be proven
    spans = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("load", "prove", "register") if name in seconds)
    log.info(
        f"ready: {settings.served_model_name} at {settings.endpoint} after {phases.age:.1f} s "
        f"(verdict {verdict_seconds:.1f} s, {spans})"
    )
    if settings.ready_file is None:
        return
    content = {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "ranks": ranks,
        "attempt": attempt_of(os.environ),
        "model": settings.served_model_name,
        "endpoint": settings.endpoint,
        "system": system,
        "phases": seconds,
        "verdict_seconds": verdict_seconds,
        "ready_seconds": phases.age,
    }
    partial = settings.ready_file.with_name(settings.ready_file.name + ".partial")
    try:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(settings.ready_file)
    except OSError as error:
        log.warning(f"the ready file {settings.ready_file} can't be written: {error.strerror}")


def forget(ready_file: Path | None) -> None:
    """Remove the ready file: also one that a run before this one, which was killed, has left."""
    if ready_file is not None:
        with contextlib.suppress(OSError):
            ready_file.unlink()
