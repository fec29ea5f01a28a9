# SPDX-License-Identifier: Apache-2.0
"""One worker's picture as SVG: a row per rank, grouped by node, a bar per phase. Pure; colours come from the page's style sheet."""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.observe.timeline_facts import ORDER, describe_failure, facts_of, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.observe.timeline_bars import Bar, Row
    from dynamo_mpi.observe.timeline_facts import PhaseFacts
    from dynamo_mpi.observe.timeline_scale import Scale

WIDTH, LEFT, RIGHT = 1200.0, 176.0, 24.0
_TOP, _LINE = 34.0, 15.0
_MOST_HEIGHT, _HIGHEST, _LOWEST = 1536.0, 24.0, 3.0
_FONT = 11.0
_CHARACTER = 0.62 * _FONT
_NODE_CHARACTERS, _RANK_CHARACTERS = 14, 9
_MARK = 4.5
_LEAST_MARKED = 2.0
_LEAST_WAIT = 0.4


class _Sheet(NamedTuple):
    """Where rows stand, and how high they and their bars are."""

    height: float
    bar: float
    tops: tuple[float, ...]
    bottom: float


def draw(start: Start, rows: Sequence[Row], scale: Scale, ready: float | None, name: str) -> str:
    """Draw one worker.

    Args:
        start: whose.
        rows: its ranks', by the picture's clock.
        scale: the time axis.
        ready: when it was ready, by the same clock.
        name: of the picture, for who can't see it; it is escaped here.
    """
    facts = facts_of(rows)
    sheet = _lay_out(rows)
    notes = list(_notes(start, scale, ready))
    height = sheet.bottom + _LINE * (1 + len(notes))
    slowest = {fact.phase: fact for fact in facts if fact.ranks > 1}
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {_n(height)}" role="img" aria-label="{html.escape(name)}" '
        f'style="--h:{_n(sheet.bar)}px">',
        *_bands(rows, sheet),
        *_axis(scale, sheet),
        *(_row(row, top, scale, sheet.bar, ready, slowest) for row, top in zip(rows, sheet.tops, strict=True)),
        *_calm(scale, sheet),
        *_moment(scale, sheet, ready),
        *_labels(start, rows, sheet, slowest),
        *_marks(start, rows, sheet, scale, slowest),
        *_below(notes, sheet),
        "</svg>",
    ]
    return "\n".join(parts)


def _below(notes: Sequence[tuple[str, float, str, str]], sheet: _Sheet) -> Iterator[str]:
    for at, (kind, x, anchor, text) in enumerate(notes):
        place = f'x="{_n(x)}" y="{_n(sheet.bottom + _LINE * (at + 1) - 2)}" text-anchor="{anchor}"'
        yield f'<text class="n {kind}" {place}>{html.escape(text)}</text>'


def style_of(phase: str) -> str:
    """Return the end of the names of a phase's classes."""
    return str(ORDER.index(phase)) if phase in ORDER else "x"


def fitting(text: str, width: float) -> str:
    """Cut a text so that it is no wider than ``width`` in the picture's font."""
    room = int(width / _CHARACTER)
    if columns(text) <= room:
        return text
    kept = ""
    for char in text:
        if columns(kept + char) > room - 1:
            break
        kept += char
    return kept + "…" if room > 1 else ""


def columns(text: str) -> int:
    """Return how wide a text is, in characters of a font in which all are alike."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def part_of(row: Row) -> str:
    """Name what a row shows that is no rank: a service, or nothing where it is several steps of one."""
    return row.bars[0].phase if len(row.bars) == 1 else ""


def _lay_out(rows: Sequence[Row]) -> _Sheet:
    nodes = len({row.host for row in rows})
    room = _MOST_HEIGHT - 4 * nodes
    height = min(_HIGHEST, max(_LOWEST, room // max(1, len(rows))))
    gap = 10.0 if height >= 10 else 4.0
    tops: list[float] = []
    y = _TOP
    for at, row in enumerate(rows):
        if at:
            y += height + (gap if row.host != rows[at - 1].host else 0.0)
        tops.append(y)
    return _Sheet(height, height - (2.0 if height >= 10 else 0.5), tuple(tops), y + height + 6)


def _bands(rows: Sequence[Row], sheet: _Sheet) -> Iterator[str]:
    """Shade every second node."""
    for at, (first, last) in enumerate(_nodes(rows)):
        if at % 2:
            top = sheet.tops[first] - 2
            height = sheet.tops[last] + sheet.height + 2 - top
            yield f'<rect class="band" x="0" y="{_n(top)}" width="{WIDTH:g}" height="{_n(height)}"/>'


def _nodes(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Return the first and the last row of each run of rows on one node."""
    first = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at].host != rows[first].host:
            yield first, at - 1
            first = at


def _axis(scale: Scale, sheet: _Sheet) -> Iterator[str]:
    ticks = scale.ticks()
    grid = "".join(f"M{_n(scale.x(moment))} {_TOP - 6:g}V{_n(sheet.bottom)}" for moment, _ in ticks)
    yield f'<path class="grid" d="{grid}"/>'
    free = 0.0
    for moment, label in ticks:
        half = len(label) * _CHARACTER / 2
        x = min(scale.x(moment), WIDTH - half)
        if x - half >= free:
            free = x + half + _CHARACTER
            yield f'<text class="t" x="{_n(x)}" y="{_TOP - 14:g}" text-anchor="middle">{label}</text>'


def _row(row: Row, top: float, scale: Scale, height: float, ready: float | None, slowest: dict[str, PhaseFacts]) -> str:
    parts = [f'<g class="r" transform="translate(0 {_n(top)})">']
    texts: list[str] = []
    for bar in row.bars:
        left, own, right = scale.x(bar.begin), scale.x(bar.own_end), scale.x(bar.end)
        kind = style_of(bar.phase)
        waits = right - own >= _LEAST_WAIT
        fact = slowest.get(bar.phase)
        is_slowest = fact is not None and fact.slowest == row.rank and fact.is_uneven
        classes = f"b {'w' if waits else 'p'}{kind}{' s' if is_slowest else ''}"
        parts.append(
            f'<rect class="{classes}" x="{_n(left)}" width="{_n(right - left)}"><title>{_title(row, bar)}</title></rect>'
        )
        if waits and own > left:
            parts.append(f'<rect class="o p{kind}" x="{_n(left)}" width="{_n(own - left)}"/>')
        room = _room(bar, scale, ready)
        if height >= 14 and (text := _label(bar, room, fact if is_slowest else None)):
            texts.append(f'<text class="i" x="{_n(left + 6)}" y="{_n(height / 2 + 3.5)}">{text}</text>')
    return "".join([*parts, *texts, "</g>"])


def _title(row: Row, bar: Bar) -> str:
    own = f", own part {seconds(bar.own)}" if bar.told else ""
    goes_on = ", goes on" if bar.open else ""
    return html.escape(f"{row.rank} {row.host}: {bar.phase} {seconds(bar.end - bar.begin)}{own}{goes_on}")


def _room(bar: Bar, scale: Scale, ready: float | None) -> float:
    """Return how wide what is written on a bar may be: on its own part, before the gap in the axis and the line of being ready."""
    end = scale.x(bar.own_end)
    if ready is not None and bar.begin < ready < bar.own_end:
        end = scale.x(ready)
    if scale.calm is not None and bar.begin < scale.calm[1] and bar.own_end > scale.calm[0]:
        end = min(end, scale.x(sum(scale.calm) / 2) - 4)
    return end - scale.x(bar.begin) - 12


def _label(bar: Bar, room: float, slowest: PhaseFacts | None) -> str:
    full = f"{bar.phase} {seconds(bar.own)}"
    late = [] if slowest is None else [f"{full}: {seconds(slowest.behind)} after the median"]
    return html.escape(next((text for text in (*late, full, bar.phase) if columns(text) * _CHARACTER <= room), ""))


def _calm(scale: Scale, sheet: _Sheet) -> Iterator[str]:
    if scale.calm is None:
        return
    middle = scale.x(sum(scale.calm) / 2)
    teeth = "l6 6l-6 6" * (int((sheet.bottom - _TOP + 6) / 12) + 1)
    for kind, shift in (("torn", -3), ("gap", -7), ("gap", 1)):
        yield f'<path class="{kind}" d="M{_n(middle + shift)} {_TOP - 6:g}{teeth}"/>'


def _moment(scale: Scale, sheet: _Sheet, ready: float | None) -> Iterator[str]:
    if ready is not None:
        yield f'<path class="ready" d="M{_n(scale.x(min(ready, scale.end)))} {_TOP - 6:g}V{_n(sheet.bottom)}"/>'


def _notes(start: Start, scale: Scale, ready: float | None) -> Iterator[tuple[str, float, str, str]]:
    """Return what stands below: class, place, alignment, text."""
    if ready is not None:
        x = scale.x(min(ready, scale.end))
        yield "", x, "end" if x > WIDTH / 2 else "start", f"ready after {seconds((start.ready or 0.0) - start.origin)}"
    if scale.calm is not None:
        first, last = scale.calm
        x = scale.x((first + last) / 2)
        yield "", x, "end" if x > WIDTH / 2 else "start", f"not drawn in full: {seconds(last - first)} of serving"
    if text := describe_failure(start):
        yield "bad", LEFT, "start", fitting(f"✕ {text}", WIDTH - LEFT - RIGHT)


def _labels(start: Start, rows: Sequence[Row], sheet: _Sheet, slowest: dict[str, PhaseFacts]) -> Iterator[str]:
    """Name nodes and ranks, as many as there is room for: first the rank that failed, then the slowest, then the others."""
    shift = sheet.bar / 2 + 3.5
    free = -1.0
    for first, last in _nodes(rows):
        top = sheet.tops[first]
        if top >= free:
            free = top + _FONT + 1
            text = fitting(rows[first].host, _NODE_CHARACTERS * _CHARACTER)
            middle = top + min(shift, (sheet.tops[last] - top) / 2 + shift)
            yield f'<text class="h" x="4" y="{_n(middle)}">{html.escape(text)}</text>'
    if start.layout is None:
        for row, top in zip(rows, sheet.tops, strict=True):
            text = html.escape(fitting(part_of(row), _RANK_CHARACTERS * _CHARACTER))
            yield f'<text class="k" x="{LEFT - 8:g}" y="{_n(top + shift)}" text-anchor="end">{text}</text>'
        return
    failed = start.failure.rank if start.failure else None
    slow = {fact.slowest for fact in slowest.values() if fact.is_uneven}

    def rank_of(at: int) -> tuple[int, int]:
        return (0 if rows[at].rank == failed else 1 if rows[at].rank in slow else 2, at)

    taken: list[float] = []
    for at in sorted(range(len(rows)), key=rank_of):
        y = sheet.tops[at]
        if all(abs(y - other) >= _FONT + 1 for other in taken):
            taken.append(y)
            kind = "k bad" if rows[at].rank == failed else "k slow" if rows[at].rank in slow else "k"
            yield f'<text class="{kind}" x="{LEFT - 8:g}" y="{_n(y + shift)}" text-anchor="end">{rows[at].rank}</text>'


def _marks(
    start: Start, rows: Sequence[Row], sheet: _Sheet, scale: Scale, slowest: dict[str, PhaseFacts]
) -> Iterator[str]:
    """Point at where the slowest of each phase was waited for, and at where a rank failed."""
    for row, top in zip(rows, sheet.tops, strict=True):
        middle = top + sheet.bar / 2
        for bar in row.bars:
            fact = slowest.get(bar.phase)
            wide = scale.x(bar.end) - scale.x(bar.begin) >= _LEAST_MARKED
            if fact is not None and fact.slowest == row.rank and fact.is_uneven and wide:
                x = scale.x(bar.begin if fact.came_last else bar.own_end)
                text = f"rank {row.rank} was the slowest in {bar.phase}"
                yield f'<path class="m" d="M{_n(x)} {_n(middle)}l-{_MARK}-8h{2 * _MARK:g}z"><title>{html.escape(text)}</title></path>'
        if start.failure is not None and start.failure.rank == row.rank:
            x = scale.x(row.bars[-1].end) if row.bars else LEFT
            title = html.escape(describe_failure(start))
            yield f'<path class="x" d="M{_n(x - 5)} {_n(middle - 5)}l10 10m0-10l-10 10"><title>{title}</title></path>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
