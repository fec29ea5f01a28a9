# SPDX-License-Identifier: Apache-2.0
"""The ready file, which exists while the worker accepts requests, for scripts."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.mpi.restart_count import restart_count

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.supervisor.context import RankContext


class ReadyFile(WorkerHook):
    """Writes the ready file when the worker is ready, and removes it when it is not any more.

    Args:
        context: rank 0's context.
        settings: the worker's settings; they name the file.
        preflight_seconds: seconds from the start to the end of preflight.
        system: URL of /health, /live and /metrics; None if they aren't served.
    """

    def __init__(self, context: RankContext, settings: Settings, preflight_seconds: float, system: str | None) -> None:
        self._context, self._settings = context, settings
        self._preflight_seconds, self._system = preflight_seconds, system

    def on_ready(self) -> None:
        """Write the file atomically."""
        path, phases = self._settings.ready_file, self._context.phases
        if path is None:
            return
        content = {
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "ranks": self._context.world.size,
            "attempt": restart_count(os.environ),
            "model": self._settings.served_model_name,
            "endpoint": self._settings.endpoint,
            "system": self._system,
            "phases": phases.durations,
            "verdict_seconds": self._preflight_seconds,
            "ready_seconds": phases.age,
        }
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            self._context.log.warning(f"the ready file {path} can't be written: {error.strerror}")

    def on_failure_detected(self) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)

    def on_shutdown(self, code: int) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)

    def on_exit(self, code: int) -> None:
        """Remove the file."""
        remove_ready_file(self._settings.ready_file)


def remove_ready_file(path: Path | None) -> None:
    """Remove the ready file, also one that an earlier, killed run has left."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()
