# SPDX-License-Identifier: Apache-2.0
"""The ranks' progress as a table for a terminal, with a line for each node. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.supervisor.progress import progress_of
from dynamo_mpi.telemetry.progress import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.common.phases import PhaseProgress, RankTimings

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
