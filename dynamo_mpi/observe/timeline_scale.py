# SPDX-License-Identifier: Apache-2.0
"""The time axis: where a moment stands, and what is written at it. A long calm in the middle is drawn short. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.observe.timeline_bars import Row

_TICKS = 9
_CALM_WIDTH = 0.09
_CALM_FACTOR = 0.25
_CALM_MARGIN = 0.04
# where there is nothing but serving, it is drawn
_LEAST_DRAWN = 0.001
_LONG_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000, 86400)


class Scale(NamedTuple):
    """Maps seconds to a width.

    Args:
        left: where 0 s stands.
        width: of all.
        end: seconds at the right.
        calm: from when to when the axis is drawn short; None where it isn't.
    """

    left: float
    width: float
    end: float
    calm: tuple[float, float] | None = None

    def x(self, moment: float) -> float:
        """Return where a moment stands."""
        if self.calm is None:
            return self.left + self.width * moment / self.end
        first, last = self.calm
        drawn = self.end - (last - first)
        calm_width = _CALM_WIDTH * self.width
        pace = (self.width - calm_width) / drawn
        if moment <= first:
            return self.left + pace * moment
        if moment >= last:
            return self.left + pace * (moment - last + first) + calm_width
        return self.left + pace * first + calm_width * (moment - first) / (last - first)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the moments to mark, with their labels; none within the calm."""
        calm = 0.0 if self.calm is None else self.calm[1] - self.calm[0]
        step = _step((self.end - calm) / _TICKS)
        if self.calm is None:
            return [_tick(number * step, step) for number in range(int(self.end / step + 1e-9) + 1)]
        first, last = self.calm
        marks = [number * step for number in range(int(first / step) + 1)]
        number = math.ceil(last / step)
        while number * step <= self.end:
            marks.append(number * step)
            number += 1
        return [_tick(mark, step) for mark in marks]


def scale_for(worlds: Sequence[Sequence[Row]], left: float, width: float) -> Scale:
    """Return the axis on which all rows fit.

    Args:
        worlds: the rows of each worker.
        left: where 0 s is to stand.
        width: of the axis.
    """
    bars = [bar for rows in worlds for row in rows for bar in row.bars]
    end = max((bar.end for bar in bars), default=0.0) or 1.0
    serving = [[bar for row in rows for bar in row.bars if bar.phase == "serve"] for rows in worlds]
    serving = [world for world in serving if world]
    if not serving:
        return Scale(left, width, end)
    # nothing but serving happens then
    begun = [max(bar.begin for bar in world) for world in serving]
    first = max([*begun, *(bar.end for bar in bars if _is_start(bar.phase))])
    last = min(min(bar.end for bar in world) for world in serving)
    drawn = end - (last - first)
    if last - first <= _CALM_FACTOR * drawn or drawn < _LEAST_DRAWN:
        return Scale(left, width, end)
    margin = _CALM_MARGIN * drawn
    return Scale(left, width, end, (first + min(margin, (last - first) / 4), last))


def _is_start(phase: str) -> bool:
    return phase not in ("serve", "drain", "exit")


def _step(least: float) -> float:
    if least > 1:
        return next((step for step in _LONG_STEPS if step >= least), 86400 * math.ceil(least / 86400))
    power = 10.0 ** math.floor(math.log10(max(least, 1e-6)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _tick(moment: float, step: float) -> tuple[float, str]:
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    return moment, f"{moment:,.{digits}f} s"
