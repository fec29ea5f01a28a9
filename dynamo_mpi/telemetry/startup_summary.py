# SPDX-License-Identifier: Apache-2.0
"""What a startup trace shows, for every form of output: each phase's durations, the time axis, sentences. Pure."""

from __future__ import annotations

import math
import unicodedata
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.phases import PHASES, PROCESS_START
from dynamo_mpi.layout.format import counted
from dynamo_mpi.telemetry.startup_trace import ENDED, FAILED, STOPPED, Bar, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.telemetry.startup_trace import FailureMark, StartupTrace

ORDER = (PROCESS_START, *PHASES)
_NOT_STARTUP = ORDER[ORDER.index("serve") :]
# ranks begin their first phase independently
_TOGETHER = PHASES[1:]
# one rank of each node copies, and its others wait for it
_BY_NODE = "stage"
_NAMED_SHARE = 0.1
_MAX_NAMED = 2
_ALIKE_SECONDS, _ALIKE_SHARE = 0.05, 0.02
_TICKS = 9
_CALM_WIDTH, _CALM_FACTOR, _CALM_MARGIN = 0.09, 0.25, 0.04
_MIN_DRAWN_SECONDS = 0.001
_LONG_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000, 86400)


class PhaseSummary(NamedTuple):
    """One phase of all ranks, in seconds.

    Args:
        phase: its name.
        ranks: how many ranks have been in it; of what one rank of a node does for the others, how many nodes.
        begin: when the first rank began it.
        end: when the last rank ended it.
        min: the shortest own part of a rank; if no rank reported its own part, the shortest whole phase.
        median: of the same.
        max: the longest.
        slowest: the rank that the others waited for.
        host: its node.
        behind: how much later than the median that rank was.
        is_open: whether some rank was still at its part when this was written.
        by_arrival: whether the slowest is the rank that began a common phase last; otherwise its own part took longest.
    """

    phase: str
    ranks: int
    begin: float
    end: float
    min: float
    median: float
    max: float
    slowest: int
    host: str
    behind: float
    is_open: bool
    by_arrival: bool

    @property
    def took(self) -> float:
        """How long the phase took in all."""
        return self.end - self.begin

    @property
    def is_uneven(self) -> bool:
        """Whether the slowest was late enough to be named."""
        # a rank serves as soon as its own part of the start is over, so none is waited for
        waited_for = self.ranks > 1 and self.phase != "serve" and not self.is_open
        return waited_for and self.behind > max(_ALIKE_SECONDS, _ALIKE_SHARE * self.took)


def summarize_phases(rows: Iterable[Row]) -> tuple[PhaseSummary, ...]:
    """Return a summary of every phase that has begun, in the order in which a worker runs them."""
    found: dict[str, list[tuple[Row, Bar]]] = {}
    for row in rows:
        for bar in row.bars:
            found.setdefault(bar.phase, []).append((row, bar))
    known = [phase for phase in ORDER if phase in found]
    return tuple(_summarize(phase, found[phase]) for phase in (*known, *(name for name in found if name not in ORDER)))


def _summarize(phase: str, every: Sequence[tuple[Row, Bar]]) -> PhaseSummary:
    parts = _longest_of_each_node(every) if phase == _BY_NODE else every
    owns = [bar.own for _, bar in parts]
    # without reported own parts all ranks end a common phase together, after the last one has begun it
    by_arrival = phase in _TOGETHER and not any(bar.reported for _, bar in parts)
    lateness = [bar.begin for _, bar in parts] if by_arrival else owns
    latest = max(range(len(parts)), key=lambda at: (lateness[at], -parts[at][0].rank))
    row = parts[latest][0]
    return PhaseSummary(
        phase,
        len({row.rank for row, _ in parts}),
        min(bar.begin for _, bar in every),
        max(bar.end for _, bar in every),
        min(owns),
        median(owns),
        max(owns),
        row.rank,
        row.host,
        lateness[latest] - median(lateness),
        any(bar.open and not bar.reported for _, bar in every),
        by_arrival,
    )


def _longest_of_each_node(parts: Sequence[tuple[Row, Bar]]) -> list[tuple[Row, Bar]]:
    longest: dict[str, tuple[Row, Bar]] = {}
    for row, bar in parts:
        if row.host not in longest or bar.own > longest[row.host][1].own:
            longest[row.host] = row, bar
    return list(longest.values())


class Scale(NamedTuple):
    """Maps seconds to a place between ``left`` and ``left + width``, where ``end`` seconds are.

    A long stretch of serving, from ``calm[0]`` to ``calm[1]`` seconds, is drawn short.
    """

    left: float
    width: float
    end: float
    calm: tuple[float, float] | None = None

    def x(self, moment: float) -> float:
        """Return the place of a time."""
        if self.calm is None:
            return self.left + self.width * moment / self.end
        first, last = self.calm
        calm_width = _CALM_WIDTH * self.width
        pace = (self.width - calm_width) / (self.end - (last - first))
        if moment <= first:
            return self.left + pace * moment
        if moment >= last:
            return self.left + pace * (moment - last + first) + calm_width
        return self.left + pace * first + calm_width * (moment - first) / (last - first)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the times to mark, with their labels; none within the calm."""
        first, last = self.calm or (self.end, self.end)
        step = _step((self.end - (last - first)) / _TICKS)
        marks = [number * step for number in range(int(first / step + 1e-9) + 1)]
        after = 0 if self.calm is None else int(self.end / step) + 1
        marks += [number * step for number in range(math.ceil(last / step), after)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
        return [(mark, f"{mark:,.{digits}f} s") for mark in marks]


def scale_for(workers: Sequence[Sequence[Row]], left: float, width: float) -> Scale:
    """Return the axis that holds all rows of all workers."""
    bars = [bar for rows in workers for row in rows for bar in row.bars]
    end = max((bar.end for bar in bars), default=0.0) or 1.0
    serving = [bars for rows in workers if (bars := [bar for row in rows for bar in row.bars if bar.phase == "serve"])]
    if not serving:
        return Scale(left, width, end)
    # from when every worker only serves until the first rank stops serving
    last = min(min(bar.end for bar in bars) for bars in serving)
    first = max(
        *(max(bar.begin for bar in bars) for bars in serving),
        *(bar.end for bar in bars if bar.phase not in _NOT_STARTUP),
        0.0,
    )
    drawn = end - (last - first)
    if last - first <= _CALM_FACTOR * drawn or drawn < _MIN_DRAWN_SECONDS:
        return Scale(left, width, end)
    return Scale(left, width, end, (first + min(_CALM_MARGIN * drawn, (last - first) / 4), last))


def _step(minimum: float) -> float:
    if minimum > 1:
        return next((step for step in _LONG_STEPS if step >= minimum), 86400 * math.ceil(minimum / 86400))
    power = 10.0 ** math.floor(math.log10(max(minimum, 1e-6)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= minimum * 0.999)


def format_seconds(value: float) -> str:
    """Write a duration as ``4 ms``, ``2.41 s``, ``142 s`` or ``2 h 13 min``."""
    if value < 0.9995:
        return f"{max(0.0, value) * 1000:.0f} ms"
    if value < 3600:
        return f"{value:.{max(0, 2 - int(math.log10(value)))}f} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def columns(text: str) -> int:
    """Return the width of a text in a monospaced font, in characters."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def part_of(row: Row) -> str:
    """Name what a row that is no rank shows: a service, or nothing if it has several steps."""
    return row.bars[0].phase if len(row.bars) == 1 else ""


def headline(trace: StartupTrace) -> str:
    """Describe the outcome of the start in one sentence."""
    age = format_seconds(trace.written - trace.origin)
    failure = trace.failure
    ready = "" if trace.ready is None else f"ready after {format_seconds(trace.ready - trace.origin)}"
    if trace.outcome in (FAILED, STOPPED):
        phase = f" in {failure.phase}" if failure and failure.phase else ""
        verb = "stopped" if trace.outcome == STOPPED else "failed"
        code = f" with exit code {failure.exit_code}" if failure else ""
        return f"{ready}; {verb}{phase} after {age}{code}".removeprefix("; ")
    if trace.outcome == ENDED:
        return f"{ready}; ended in order after {age}".removeprefix("; ")
    return ready or f"on its way for {age}"


def describe_failure(trace: StartupTrace) -> str:
    """Name the rank that failed and its error; empty if none did."""
    failure = trace.failure
    if failure is None:
        return ""
    where = "" if failure.rank is None else f"rank {failure.rank} on {failure.host}{':' if failure.reported else ''} "
    return f"{where}{failure.error}"


def describe_worker(trace: StartupTrace) -> str:
    """Describe the worker: ``prefill worker (trtllm), tp 8, pp 2, 16 ranks on 2 nodes, job 12.0, attempt 1``."""
    if trace.layout is None:
        return trace.name
    layout = trace.layout
    sizes = {"tp": layout.tp_size, "pp": layout.pp_size, "cp": layout.cp_size, "ep": layout.ep_size}
    nodes = len({rank.host for rank in trace.ranks})
    return ", ".join(
        [
            f"{trace.role} worker ({trace.engine})",
            *(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "tp"),
            *(["attention dp"] if layout.attention_dp else []),
            f"{counted(len(trace.ranks), 'rank')} on {counted(nodes, 'node')}",
            *([f"job {trace.job}{'' if trace.step is None else f'.{trace.step}'}"] if trace.job else []),
            f"attempt {trace.attempt}",
        ]
    )


def describe_phases(trace: StartupTrace, phases: Sequence[PhaseSummary], rows: Sequence[Row]) -> list[str]:
    """Describe which phases took the time and which ranks were waited for, a sentence each."""
    if trace.layout is None:
        return [", ".join(f"{phase.phase} {format_seconds(phase.took)}" for phase in phases)]
    startup = [phase for phase in phases if phase.phase in ORDER and phase.phase not in _NOT_STARTUP]
    whole = max((phase.end for phase in startup), default=0.0) - min((phase.begin for phase in startup), default=0.0)
    longest = sorted((phase for phase in startup if phase.took > 0), key=lambda phase: -phase.took)
    named = [phase for at, phase in enumerate(longest) if at == 0 or phase.took >= _NAMED_SHARE * whole][:_MAX_NAMED]
    lines = [_describe_phase(phase) for phase in named]
    if trace.outcome in (FAILED, STOPPED) and trace.ready is None and trace.failure and trace.failure.phase:
        done = sum(_is_done(row, trace.failure) for row in rows)
        lines.append(f"of {counted(len(rows), 'rank')}, {done} had done their part of {trace.failure.phase}")
    if clipped := sum(row.clipped for row in rows):
        what = counted(clipped, "phase")
        lines.append(f"{what} had no length, or began before the one ahead had ended, and is cut off")
    if silent := [row.rank for row in rows if not row.bars]:
        some = f"{', '.join(map(str, silent[:8]))}{', …' * (len(silent) > 8)}"
        lines.append(f"{counted(len(silent), 'rank')} had reported nothing: {some}")
    return lines


def _is_done(row: Row, failure: FailureMark) -> bool:
    of_phase = [bar for bar in row.bars if bar.phase == failure.phase]
    return row.rank != failure.rank and any(bar.reported or not bar.open for bar in of_phase)


def _describe_phase(phase: PhaseSummary) -> str:
    took = format_seconds(phase.took)
    if phase.is_open:
        return f"{phase.phase} had gone on for {took}"
    text = f"{phase.phase} took {took}"
    if phase.ranks == 1:
        return text
    if not phase.is_uneven:
        same = "came to it at about the same time" if phase.by_arrival else "were about equally fast"
        return f"{text}; the ranks {same}"
    how = "came to it last" if phase.by_arrival else "was the slowest"
    behind = format_seconds(phase.behind)
    return f"{text}; rank {phase.slowest} on {phase.host} {how}, {behind} after the median"
