# SPDX-License-Identifier: Apache-2.0
"""Rank 0's progress report: the ranks' progress at growing intervals as a line and as fields, or as a table on a terminal, until they serve.

With the reference engine a rank reports when its own part of a phase is done. With TensorRT-LLM only the number of bytes that each rank's
process has read is known, and the rank that has read least is named. Memory-mapped weights count only if they were read from a disk for
this process.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.supervisor.progress import progress_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dynamo_mpi.common.log_record import Fact
    from dynamo_mpi.common.log_writer import LogWriter
    from dynamo_mpi.common.phases import PhaseProgress, RankTimings
    from dynamo_mpi.config.worker import Settings
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.progress import ProgressTracker


MOST_SECONDS = 300.0
WATCHED = ("hardware_check", "load", "warmup", "register")
"""Phases that may take long, so that progress is reported."""


def intervals(first: float, most: float = MOST_SECONDS) -> Iterator[float]:
    """Yield the seconds between one line and the next, doubled each time, up to ``most``."""
    seconds = max(first, 0.1)
    while True:
        yield min(seconds, most)
        seconds = min(2 * seconds, most)


def describe(progress: PhaseProgress, *, parts_seen: bool) -> str:
    """Describe the progress in one line.

    Args:
        progress: the progress.
        parts_seen: whether ranks report when their own part is done.
    """
    if progress.slowest_rank is None:
        return f"{progress.phase}: no rank has reported yet"
    where = f"{progress.slowest_host} (rank {progress.slowest_rank})"
    if parts_seen:
        text = f"{progress.phase} {progress.done}/{progress.ranks} ranks, slowest {where} {progress.seconds:.0f} s"
        return f"{text}, {_share(progress)}" if progress.read is not None and progress.ranks > progress.done else text
    text = f"{progress.phase} {progress.seconds:.0f} s"
    if progress.read is None or progress.slowest_read is None:
        return f"{text}; dynamo.trtllm does not report the progress of each rank"
    who = "the rank has" if progress.ranks == 1 else f"{progress.ranks} ranks have"
    return f"{text}, {who} read {size(progress.read)}, the least {where}: {size(progress.slowest_read)}"


def facts(progress: PhaseProgress) -> dict[str, Fact]:
    """Return the progress as fields for a JSON log line; unknown values are left out."""
    known: dict[str, Fact] = {
        "phase": progress.phase,
        "done": progress.done,
        "ranks": progress.ranks,
        "slowest_rank": progress.slowest_rank,
        "slowest_host": progress.slowest_host,
        "seconds": round(progress.seconds, 1),
        "read_bytes": progress.read,
        "slowest_read_bytes": progress.slowest_read,
    }
    return {name: fact for name, fact in known.items() if fact is not None}


def size(count: int) -> str:
    """Format a number of bytes, in GB of 10^9 bytes, as usual for disks."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _share(progress: PhaseProgress) -> str:
    return f"{size(progress.slowest_read or 0)} of {size(progress.read or 0)} read"


_LEAST_ROWS = 3
_HEAD = ("ranks", "slowest", "seconds", "read")


class Terminal(NamedTuple):
    """Size of a terminal, in characters."""

    width: int
    height: int


def table(phase: str, ranks: Sequence[RankTimings], now: float, terminal: Terminal, *, parts_seen: bool) -> list[str]:
    """Return the table's lines, which fit into the terminal with one line left above and one below.

    If there are more nodes than lines, the slowest come first, and the last line counts the rest.

    Args:
        phase: the world's phase.
        ranks: all ranks.
        now: seconds since 1970, by rank 0's clock.
        terminal: size of the terminal.
        parts_seen: whether ranks report when their own part is done.
    """
    nodes: dict[str, list[RankTimings]] = {}
    for rank in ranks:
        nodes.setdefault(rank.host, []).append(rank)
    states = [(host, progress_of(phase, group, now)) for host, group in nodes.items()]
    rows = max(_LEAST_ROWS, terminal.height - 2) - 1
    rest = ""
    if len(states) > rows:
        ordered = sorted(states, key=lambda state: _behind(state[1]))
        states, others = ordered[: rows - 1], ordered[rows - 1 :]
        done = sum(state.done for _, state in others)
        count = f", {done}/{sum(state.ranks for _, state in others)} ranks" if parts_seen else ""
        rest = f"and {len(others)} more nodes{count}"
    cells = [(phase, *_HEAD), *(_row(host, state, parts_seen) for host, state in states)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(_placed(row, widths)).rstrip() for row in cells] + ([rest] if rest else [])
    # a line that fills a terminal's last column may wrap
    return [line[: max(1, terminal.width - 1)] for line in lines]


def _row(host: str, state: PhaseProgress, parts_seen: bool) -> tuple[str, ...]:
    done = f"{state.done}/{state.ranks}" if parts_seen else str(state.ranks)
    if state.slowest_rank is None:
        return (host, done, "", "", "")
    read = "" if state.read is None else size(state.read)
    return (host, done, f"rank {state.slowest_rank}", f"{state.seconds:.0f} s", read)


def _behind(state: PhaseProgress) -> tuple[float, float, float]:
    return (state.done - state.ranks, -state.seconds, state.read or 0)


def _placed(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    name, *numbers = row
    return [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]


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
        tracker: the ranks' progress.
        settings: the worker's settings: ``progress`` (``plain`` lines, ``live`` for a table, ``off``; ``auto`` chooses ``plain`` or ``live``)
            and ``progress_interval``, seconds to the first line of a phase.
        on_progress: called every two seconds, and whenever a line is due, in the reporter's thread, even if nothing is shown.
        writer: draws the table.
    """

    def __init__(
        self,
        context: RankContext,
        tracker: ProgressTracker,
        settings: Settings,
        on_progress: Callable[[PhaseProgress], object] = lambda _: None,
        writer: LogWriter = log_writer,
    ) -> None:
        self._tracker, self._phases, self._log, self._writer = tracker, context.phases, context.log, writer
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
        progress = self._tracker.progress()
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
        ranks = self._tracker.ranks()
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
