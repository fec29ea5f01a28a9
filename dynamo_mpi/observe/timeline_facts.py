# SPDX-License-Identifier: Apache-2.0
"""What a start's picture says in words and numbers: each phase's durations, who was the slowest, how it came out. Pure."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.observe.timeline import ENDED, FAILED, STOPPED
from dynamo_mpi.observe.timeline_bars import Bar, Row
from dynamo_mpi.parallelism.wording import counted
from dynamo_mpi.supervision.phases import BEFORE, PHASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.observe.timeline import Mishap, Start

ORDER = (BEFORE, *PHASES)
# of a start, what is over when it serves
_STARTING = ORDER[: ORDER.index("serve")]
# what begins for each rank by itself is its own affair
_TOGETHER = PHASES[1:]
_NAMED_SHARE = 0.1
_MOST_NAMED = 2
_ALIKE_SECONDS, _ALIKE_SHARE = 0.05, 0.02


class PhaseFacts(NamedTuple):
    """One phase of all ranks, in seconds.

    Args:
        phase: its name.
        ranks: that have been in it.
        begin: when the first began it.
        end: when the last ended it.
        least: the shortest own part; where no rank has told its own, of the whole.
        middle: the median.
        most: the longest.
        slowest: the rank that the others waited for.
        host: its node.
        behind: how much later than the median that one was.
        goes_on: whether some rank was still at its part when this was written.
        came_last: whether it is because it came late to what ranks do together; else because its own part took longest.
    """

    phase: str
    ranks: int
    begin: float
    end: float
    least: float
    middle: float
    most: float
    slowest: int
    host: str
    behind: float
    goes_on: bool
    came_last: bool

    @property
    def took(self) -> float:
        """How long all of it took."""
        return self.end - self.begin

    @property
    def is_uneven(self) -> bool:
        """Whether the slowest was late enough to be spoken of."""
        # serving begins when a rank's part of the start is over, and nobody waits for anyone
        waited_for = self.ranks > 1 and self.phase != "serve" and not self.goes_on
        return waited_for and self.behind > max(_ALIKE_SECONDS, _ALIKE_SHARE * self.took)


def facts_of(rows: Sequence[Row]) -> tuple[PhaseFacts, ...]:
    """Return what is to be said of every phase that there was, in the order of a life."""
    found: dict[str, list[tuple[Row, Bar]]] = {}
    for row in rows:
        for bar in row.bars:
            found.setdefault(bar.phase, []).append((row, bar))
    known = [phase for phase in ORDER if phase in found]
    return tuple(_facts(phase, found[phase]) for phase in (*known, *(name for name in found if name not in ORDER)))


def _facts(phase: str, parts: Sequence[tuple[Row, Bar]]) -> PhaseFacts:
    owns = [bar.own for _, bar in parts]
    # where nobody has said what was its own part, all of them end together, and the last to come is whom they waited for
    together = phase in _TOGETHER and not any(bar.told for _, bar in parts)
    lateness = [bar.begin for _, bar in parts] if together else owns
    latest = max(range(len(parts)), key=lambda at: (lateness[at], -parts[at][0].rank))
    row = parts[latest][0]
    return PhaseFacts(
        phase,
        len({row.rank for row, _ in parts}),
        min(bar.begin for _, bar in parts),
        max(bar.end for _, bar in parts),
        min(owns),
        median(owns),
        max(owns),
        row.rank,
        row.host,
        lateness[latest] - median(lateness),
        any(bar.open and not bar.told for _, bar in parts),
        together,
    )


def seconds(value: float) -> str:
    """Write a duration as a person reads it: ``4 ms``, ``2.41 s``, ``142 s``, ``2 h 13 min``."""
    if value < 0.9995:
        return f"{max(0.0, value) * 1000:.0f} ms"
    if value < 3600:
        return f"{value:.{max(0, 2 - int(math.log10(value)))}f} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def headline(start: Start) -> str:
    """Say in one sentence how the start came out."""
    age = start.written - start.origin
    failure = start.failure
    ready = "" if start.ready is None else f"ready after {seconds(start.ready - start.origin)}"
    if start.outcome in (FAILED, STOPPED):
        phase = f" in {failure.phase}" if failure and failure.phase else ""
        verb = "stopped" if start.outcome == STOPPED else "failed"
        code = f" with exit code {failure.exit_code}" if failure else ""
        return f"{ready}; {verb}{phase} after {seconds(age)}{code}".removeprefix("; ")
    if start.outcome == ENDED:
        return f"{ready}; ended in order after {seconds(age)}".removeprefix("; ")
    return ready or f"on its way for {seconds(age)}"


def describe_failure(start: Start) -> str:
    """Name the rank that failed and say why; nothing where none has."""
    failure = start.failure
    if failure is None:
        return ""
    where = "" if failure.rank is None else f"rank {failure.rank} on {failure.host}{':' if failure.told else ''} "
    return f"{where}{failure.error}"


def sentences(start: Start, facts: Sequence[PhaseFacts], rows: Sequence[Row]) -> list[str]:
    """Say where the time went, and who was waited for."""
    if start.layout is None:
        return [", ".join(f"{fact.phase} {seconds(fact.took)}" for fact in facts)]
    starting = [fact for fact in facts if fact.phase in _STARTING]
    whole = max((fact.end for fact in starting), default=0.0) - min((fact.begin for fact in starting), default=0.0)
    longest = sorted((fact for fact in starting if fact.took > 0), key=lambda fact: -fact.took)
    named = [fact for at, fact in enumerate(longest) if at == 0 or fact.took >= _NAMED_SHARE * whole][:_MOST_NAMED]
    lines = [_sentence(fact) for fact in named]
    if start.outcome in (FAILED, STOPPED) and start.ready is None and start.failure and start.failure.phase:
        through = sum(_is_through(row, start.failure) for row in rows)
        lines.append(f"of {counted(len(rows), 'rank')}, {through} had done their part of {start.failure.phase}")
    if clipped := sum(row.clipped for row in rows):
        lines.append(
            f"{counted(clipped, 'phase')} had no length, or began before the one ahead had ended, and is cut off"
        )
    silent = [row.rank for row in rows if not row.bars]
    if silent:
        lines.append(
            f"{counted(len(silent), 'rank')} had told nothing: {', '.join(map(str, silent[:8]))}{', …' * (len(silent) > 8)}"
        )
    return lines


def _is_through(row: Row, failure: Mishap) -> bool:
    of_phase = [bar for bar in row.bars if bar.phase == failure.phase]
    return row.rank != failure.rank and any(bar.told or not bar.open for bar in of_phase)


def _sentence(fact: PhaseFacts) -> str:
    if fact.goes_on:
        return f"{fact.phase} had gone on for {seconds(fact.took)}"
    text = f"{fact.phase} took {seconds(fact.took)}"
    if fact.ranks == 1:
        return text
    if not fact.is_uneven:
        return (
            f"{text}; the ranks came to it at about the same time"
            if fact.came_last
            else f"{text}; the ranks were about equally fast"
        )
    who, late = f"rank {fact.slowest} on {fact.host}", seconds(fact.behind)
    if fact.came_last:
        return f"{text}; {who} came to it last, {late} after the median"
    return f"{text}; {who} was the slowest, {late} after the median"


def identity(start: Start) -> str:
    """Say what it is: ``prefill worker, tp 8, pp 2, 16 ranks on 2 nodes, job 12.0, attempt 1``."""
    if start.layout is None:
        return start.name
    layout = start.layout
    sizes = {"tp": layout.tp_size, "pp": layout.pp_size, "cp": layout.cp_size, "ep": layout.ep_size}
    shown = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "tp"]
    nodes = len({rank.host for rank in start.ranks})
    job = [f"job {start.job}{'' if start.step is None else f'.{start.step}'}"] if start.job else []
    return ", ".join(
        [
            f"{start.role} worker ({start.engine})",
            *shown,
            *(["attention dp"] if layout.attention_dp else []),
            f"{counted(len(start.ranks), 'rank')} on {counted(nodes, 'node')}",
            *job,
            f"attempt {start.attempt}",
        ]
    )
