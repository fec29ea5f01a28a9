# SPDX-License-Identifier: Apache-2.0
"""Rank 0's progress report: logs the ranks' progress at growing intervals, or shows a live table, until they serve."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.telemetry.progress import WATCHED, Terminal, describe, facts, intervals, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.common.log_writer import LogWriter
    from dynamo_mpi.common.phases import PhaseProgress
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.progress import ProgressTracker

_DRAW_SECONDS = 1.0
_LOOK_SECONDS = 1.0
# interval of the progress in the worker record
_PUBLISH_SECONDS = 2.0
# a short load needs no table
_DRAW_AFTER_SECONDS = 2.0


class ProgressReporter(WorkerHook):
    """Reports from `start` to `close`, in a thread, while the world is in one of the phases that may take long.

    Args:
        context: rank 0's context.
        roll: the ranks' progress.
        settings: the worker's settings: ``progress`` (``plain`` lines, ``live`` for a table, ``off``; ``auto`` chooses ``plain`` or ``live``)
            and ``progress_interval``, seconds to the first line of a phase.
        on_progress: called every two seconds, and whenever a line is due, in the reporter's thread, even if nothing is shown.
        writer: draws the table.
    """

    def __init__(
        self,
        context: RankContext,
        roll: ProgressTracker,
        settings: Settings,
        on_progress: Callable[[PhaseProgress], object] = lambda _: None,
        writer: LogWriter = log_writer,
    ) -> None:
        self._roll, self._phases, self._log, self._writer = roll, context.phases, context.log, writer
        self._report = on_progress
        self._mode = select_mode(settings.progress, is_terminal=os.isatty(2), jsonl=writer.format.jsonl)
        self._first, self._parts_seen = settings.progress_interval, settings.engine != "trtllm"
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def on_phase(self, phase: str) -> None:
        """Check the new phase at once."""
        self._changed.set()

    def on_failure_detected(self) -> None:
        """Stop, and clear the table."""
        self.close()

    def on_exit(self, code: int) -> None:
        """Stop, and clear the table."""
        self.close()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and clear the table. Idempotent, and doesn't wait."""
        self._closed = True
        self._changed.set()
        if self._mode == "live":
            self._writer.set_status_lines(())

    def _run(self) -> None:
        while not self._closed:
            phase = self._phases.current
            if phase in ("serve", "drain", "exit"):
                return
            self._changed.clear()
            if phase in WATCHED:
                self._follow(phase)
            else:
                # other observers get the phase before this one, and may take some time
                self._changed.wait(_LOOK_SECONDS)

    def _follow(self, phase: str) -> None:
        """Report until the phase ends."""
        began = time.monotonic()
        gaps = intervals(self._first)
        due = began + next(gaps)
        published = began
        while not self._closed and self._phases.current == phase:
            now = time.monotonic()
            if now >= min(due, published + _PUBLISH_SECONDS):
                progress = self._publish()
                published = now
                if now >= due:
                    self._log_progress(progress)
                    due = now + next(gaps)
            wait = min(due, published + _PUBLISH_SECONDS) - now
            if self._mode == "live":
                wait = min(wait, _DRAW_SECONDS)
                if now - began >= _DRAW_AFTER_SECONDS:
                    self._draw(phase)
            if self._changed.wait(max(0.0, wait)):
                self._changed.clear()
        if self._mode == "live":
            self._writer.set_status_lines(())

    def _publish(self) -> PhaseProgress:
        progress = self._roll.progress()
        self._report(progress)
        return progress

    def _log_progress(self, progress: PhaseProgress) -> None:
        if self._mode == "plain":
            self._log.info(describe(progress, parts_seen=self._parts_seen), facts(progress))

    def _draw(self, phase: str) -> None:
        try:
            width, height = os.get_terminal_size(2)
        except OSError:
            return
        # a terminal that doesn't know its size reports 0
        terminal = Terminal(width or 80, height or 24)
        ranks = self._roll.ranks()
        lines = table(phase, ranks, time.time(), terminal, parts_seen=self._parts_seen)
        self._writer.set_status_lines(lines)
        if self._closed:
            self._writer.set_status_lines(())


def select_mode(mode: str, *, is_terminal: bool, jsonl: bool) -> str:
    """Return the mode that is used: a table needs a terminal, and can't be mixed with JSON lines. Pure."""
    can_draw = is_terminal and not jsonl
    if mode in ("auto", "live"):
        return "live" if can_draw else "plain"
    return mode
