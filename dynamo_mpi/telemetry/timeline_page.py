# SPDX-License-Identifier: Apache-2.0
"""Startup traces as one HTML page that loads nothing and runs nothing: a picture, sentences and a table for each worker.

Every phase's colour has a contrast of 4.5 to 1 with the page and with the text on it (WCAG 2.2, 1.4.3 and 1.4.11), and phases that follow
each other can be distinguished with any kind of colour blindness; tests/unit/test_timeline_colours.py measures both.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.layout.format import counted
from dynamo_mpi.telemetry.startup_summary import (
    ORDER,
    columns,
    describe_failure,
    describe_phases,
    describe_worker,
    format_seconds,
    headline,
    part_of,
    scale_for,
    summarize_phases,
)
from dynamo_mpi.telemetry.startup_trace import DATA_BEGINS, DATA_ENDS, AlignedTrace, align, encode_traces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.telemetry.startup_summary import PhaseSummary, Scale
    from dynamo_mpi.telemetry.startup_trace import Bar, Row, StartupTrace

_WIDTH, _LEFT, _RIGHT, _TOP, _LINE = 1200.0, 176.0, 24.0, 34.0, 15.0
_MAX_HEIGHT, _MAX_ROW, _MIN_ROW, _LABELLED_ROW = 1536.0, 24.0, 3.0, 16.0
_FONT = 11.0
_CHARACTER = 0.62 * _FONT
_HOST_CHARACTERS, _RANK_CHARACTERS = 14, 9
_MIN_MARKED, _MIN_WAIT, _MIN_BAR = 2.0, 0.4, 2.0


class Scheme(NamedTuple):
    """Colours: of the page, texts, less important texts, grid lines, every second node, texts on bars, failures, and the phases in `ORDER`.

    The last of ``phases`` is for any other name.
    """

    page: str
    text: str
    quiet: str
    line: str
    band: str
    on_bar: str
    bad: str
    phases: tuple[str, ...]

    def variables(self) -> str:
        """Return the colours as CSS variables; the phases' are ``--p0``, ``--p1`` … ``--px``."""
        named = {name.replace("_", "-"): value for name, value in zip(self._fields, self[:-1], strict=False)}
        named |= {f"p{name}": colour for name, colour in zip(_CLASSES, self.phases, strict=True)}
        return ";".join(f"--{name}:{value}" for name, value in named.items())


_LIGHT = "#6b7280 #332288 #a8328f #7a6200 #800040 #7a00ee #0a6ebd #b84a00 #4b2a7b #005c44 #8c5a12 #1f2328 #5b6b8c"
_DARK = "#c6ccd4 #8f8cf0 #f09ad8 #d9b83a #ff6080 #8fe388 #46a3e6 #ff9a56 #b08cf5 #66e6b0 #d8ab6a #9aa5b2 #93a6cc"
LIGHT = Scheme("#ffffff", "#1b1f24", "#57606a", "#d5dae0", "#f3f5f7", "#ffffff", "#b3001b", tuple(_LIGHT.split()))
DARK = Scheme("#14181d", "#e8ecf1", "#a5afba", "#333b45", "#1c2229", "#10141a", "#ff8a8a", tuple(_DARK.split()))
_CLASSES = (*map(str, range(len(ORDER))), "x")
# nothing is fetched, run or sent, whatever a name or an error text contains
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """\
body{margin:0 auto;padding:1.5rem;max-width:1400px;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
h1,h2,p{overflow-wrap:anywhere;margin:.2rem 0} h1{font-size:1.45rem;line-height:1.25} h2{font-size:1.1rem;margin-top:2rem}
.quiet{color:var(--quiet)} .said,.legend{margin:.6rem 0;padding:0;list-style:none}
.failure{color:var(--bad);border-left:4px solid var(--bad);padding:.2rem .7rem;margin:.6rem 0;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem} .legend li{display:flex;align-items:center;gap:.4rem}
.legend i,.legend svg{width:1.5em;height:.9em} .w{opacity:.3} .picture{overflow-x:auto}
.picture svg{display:block;width:100%;min-width:720px} svg .r rect{height:var(--h)} svg .grid{stroke:var(--line)}
svg text{font:11px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:var(--text)} svg .t,svg .h{fill:var(--quiet)}
svg .band{fill:var(--band)} svg .gap{fill:var(--page);stroke:var(--text)} svg .ready{stroke:var(--text);stroke-dasharray:5 3}
svg .i{fill:var(--on-bar)} svg .i,svg .o{pointer-events:none} svg .slow{font-weight:700} svg .bad{fill:var(--bad);font-weight:700}
svg .m{fill:var(--text);stroke:var(--page);stroke-width:1.4} svg .x{stroke:var(--bad);stroke-width:3;fill:none}
table{border-collapse:collapse;margin:.8rem 0;font-size:.9rem;font-variant-numeric:tabular-nums} caption{text-align:left;color:var(--quiet)}
th,td{text-align:right;padding:.2rem .8rem;border-bottom:1px solid var(--line)} td{white-space:nowrap}
td:last-child{white-space:normal;overflow-wrap:anywhere} th:first-child,td:last-child,th:last-child{text-align:left}
@media print{body{max-width:none}}"""


def page(traces: Sequence[StartupTrace]) -> str:
    """Return the page of one or more workers' starts, in this order.

    Args:
        traces: at least one.
    """
    aligned, together = align(traces)
    model = next((trace.model for trace in traces if trace.model), "a deployment")
    workers = [trace for trace in traces if trace.layout is not None]
    outcome = headline(workers[0]) if len(workers) == 1 else counted(len(workers), "worker")
    title = escape(f"Start of {model}: {outcome}")
    phases = summarize_phases([row for one in aligned for row in one.rows])
    scales = [_scale(aligned)] * len(aligned) if together else [_scale([one]) for one in aligned]
    apart = '<p class="quiet">The starts lie far apart, so each has a time axis of its own.</p>'
    data = json.dumps(encode_traces(traces), separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>:root{{color-scheme:light dark;{LIGHT.variables()}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{DARK.variables()}}}}}",
        *(f".p{name}{{fill:var(--p{name})}}.c{name}{{background:var(--p{name})}}" for name in _CLASSES),
        f"{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        *(() if together else (apart,)),
        _legend(phases, failed=any(trace.failure and trace.failure.rank is not None for trace in traces)),
        *(
            part
            for one, scale in zip(aligned, scales, strict=True)
            for part in _section(one, scale, titled=len(traces) > 1)
        ),
        f"{DATA_BEGINS}{data}{DATA_ENDS}",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _scale(aligned: Sequence[AlignedTrace]) -> Scale:
    return scale_for([one.rows for one in aligned], _LEFT, _WIDTH - _LEFT - _RIGHT)


def _section(one: AlignedTrace, scale: Scale, *, titled: bool) -> Iterator[str]:
    trace = one.trace
    phases = summarize_phases(one.rows)
    sentences = describe_phases(trace, phases, one.rows)
    yield "<section>"
    if titled:
        yield f"<h2>{escape(f'{trace.name}: {headline(trace)}' if trace.layout else trace.name)}</h2>"
    if trace.layout:
        yield f'<p class="quiet">{escape(describe_worker(trace))}</p>'
    if text := describe_failure(trace):
        yield f'<p class="failure">✕ {escape(text)}</p>'
    yield '<ul class="said">' + "".join(f"<li>{escape(line)}</li>" for line in sentences) + "</ul>"
    label = f"{trace.name}: {headline(trace)}. {'. '.join(sentences)}"
    yield f'<div class="picture">{_Picture(one, phases, scale).draw(label)}</div>'
    if trace.layout:
        yield _table(trace, phases)
    yield "</section>"


def _legend(phases: Sequence[PhaseSummary], *, failed: bool) -> str:
    items = [f'<i class="c{_class(phase.phase)}"></i>{escape(phase.phase)}' for phase in phases if phase.phase in ORDER]
    if others := [phase.phase for phase in phases if phase.phase not in ORDER]:
        items.append(f'<i class="cx"></i>{escape(", ".join(others))}')
    if any(phase.ranks > 1 for phase in phases):
        items.append(f'<i class="c{_class("load")} w"></i>waits for others')
        items.append('<svg viewBox="0 0 18 11"><path class="m" d="M9 10l-4.5-8h9z"/></svg>slowest of the phase')
    if failed:
        items.append('<svg viewBox="0 0 18 11"><path class="x" d="M4 0l10 10m0-10l-10 10"/></svg>failed')
    return '<ul class="legend">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _table(trace: StartupTrace, phases: Sequence[PhaseSummary]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(phase.phase)}</th>'
        + "".join(f"<td>{format_seconds(value)}</td>" for value in (phase.took, phase.min, phase.median, phase.max))
        + f"<td>{escape(_slowest(phase))}</td></tr>"
        for phase in phases
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("phase", "took", "min", "median", "max", "slowest"))
    caption = f"Phases of {trace.name}; min, median and max are of the ranks' own parts where they are known"
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _slowest(phase: PhaseSummary) -> str:
    if phase.ranks == 1:
        return f"rank {phase.slowest} on {phase.host} alone"
    if not phase.is_uneven:
        return "-" if phase.is_open or phase.phase == "serve" else "about equal"
    how = " came to it last" if phase.by_arrival else ""
    return f"rank {phase.slowest} on {phase.host}{how}, +{format_seconds(phase.behind)}"


class _Picture:
    """One worker's picture as SVG: a row for each rank, grouped by node, with a bar for each phase."""

    def __init__(self, one: AlignedTrace, phases: Sequence[PhaseSummary], scale: Scale) -> None:
        self._trace, self._rows, self._scale = one.trace, one.rows, scale
        ready = one.trace.ready
        self._ready = None if ready is None else max(0.0, ready - one.origin)
        self._slowest = {phase.phase: phase for phase in phases if phase.ranks > 1 and phase.is_uneven}
        rows = self._rows
        self._nodes = [at for at, row in enumerate(rows) if not at or row.host != rows[at - 1].host]
        room = _MAX_HEIGHT - 4 * len(self._nodes)
        self._height = min(_MAX_ROW, max(_MIN_ROW, room // max(1, len(rows))))
        tall = self._height >= 10
        self._bar = self._height - (2.0 if tall else 0.5)
        self._gap = 10.0 if tall else 4.0
        breaks = (sum(node <= at for node in self._nodes[1:]) for at in range(len(rows)))
        self._tops = [_TOP + self._height * at + self._gap * before for at, before in enumerate(breaks)]
        self._bottom = (self._tops[-1] if rows else _TOP) + self._height + 6

    def draw(self, label: str) -> str:
        """Return the picture; ``label`` describes it to screen readers."""
        below = [*self._below()]
        height = self._bottom + _LINE * (1 + len(below))
        return "\n".join(
            [
                f'<svg viewBox="0 0 {_WIDTH:g} {_n(height)}" role="img" aria-label="{escape(label)}" '
                f'style="--h:{_n(self._bar)}px">',
                *self._background(),
                *(self._row(row, top) for row, top in zip(self._rows, self._tops, strict=True)),
                *self._lines(),
                *self._labels(),
                *self._marks(),
                *(
                    _text(kind, x, self._bottom + _LINE * (at + 1) - 2, text, anchor)
                    for at, (kind, x, text, anchor) in enumerate(below)
                ),
                "</svg>",
            ]
        )

    def _background(self) -> Iterator[str]:
        """Shade every second node; draw the time axis."""
        ends = [*self._nodes[1:], len(self._rows)]
        for first, end in list(zip(self._nodes, ends, strict=False))[1::2]:
            top, height = self._tops[first] - 2, self._tops[end - 1] - self._tops[first] + self._height + 4
            yield f'<rect class="band" x="0" y="{_n(top)}" width="{_WIDTH:g}" height="{_n(height)}"/>'
        free = 0.0
        for moment, label in self._scale.ticks():
            yield self._line("grid", self._scale.x(moment))
            half = len(label) * _CHARACTER / 2
            x = min(self._scale.x(moment), _WIDTH - half)
            if x - half >= free:
                free = x + half + _CHARACTER
                yield _text("t", x, _TOP - 14, label, "middle")

    def _line(self, kind: str, x: float) -> str:
        return f'<path class="{kind}" d="M{_n(x)} {_TOP - 6:g}V{_n(self._bottom)}"/>'

    def _row(self, row: Row, top: float) -> str:
        parts, texts = [f'<g class="r" transform="translate(0 {_n(top)})">'], []
        short: list[str] = []
        for bar in row.bars:
            left, own, right = (self._scale.x(moment) for moment in (bar.begin, bar.own_end, bar.end))
            kind, waits = f"p{_class(bar.phase)}", right - own >= _MIN_WAIT
            title = f"{row.rank} {row.host}: {bar.phase} {format_seconds(bar.end - bar.begin)}"
            title += f", own part {format_seconds(bar.own)}" * bar.reported + ", goes on" * bar.open
            is_short = right - left < _MIN_BAR
            place = f'x="{_n(left)}" width="{_n(_MIN_BAR if is_short else right - left)}"'
            # a phase of milliseconds, as register often is, would be invisible, or covered by the next one
            (short if is_short else parts).append(
                f'<rect class="b {kind}{" w" * waits}" {place}><title>{escape(title)}</title></rect>'
            )
            if waits and own > left:
                parts.append(f'<rect class="o {kind}" x="{_n(left)}" width="{_n(own - left)}"/>')
            if self._height >= _LABELLED_ROW and (text := self._bar_text(row, bar)):
                texts.append(_text("i", left + 6, self._bar / 2 + 3.5, text))
        return "".join([*parts, *short, *texts, "</g>"])

    def _bar_text(self, row: Row, bar: Bar) -> str:
        """Return the longest text that fits on the rank's own part, before the gap in the axis and the line of being ready."""
        end, calm = self._scale.x(bar.own_end), self._scale.calm
        if self._ready is not None and bar.begin < self._ready < bar.own_end:
            end = self._scale.x(self._ready)
        if calm is not None and bar.begin < calm[1] and bar.own_end > calm[0]:
            end = min(end, self._scale.x(sum(calm) / 2) - 4)
        room = (end - self._scale.x(bar.begin) - 12) / _CHARACTER
        texts = [f"{bar.phase} {format_seconds(bar.own)}", bar.phase]
        if (phase := self._slowest.get(bar.phase)) and phase.slowest == row.rank:
            texts.insert(0, f"{texts[0]}: {format_seconds(phase.behind)} after the median")
        return next((text for text in texts if columns(text) <= room), "")

    def _lines(self) -> Iterator[str]:
        """Draw when the worker became ready, and where the axis leaves out time."""
        if self._scale.calm is not None:
            x, height = self._scale.x(sum(self._scale.calm) / 2) - 4, self._bottom - _TOP + 6
            yield f'<rect class="gap" x="{_n(x)}" y="{_TOP - 6:g}" width="8" height="{_n(height)}"/>'
        if self._ready is not None:
            yield self._line("ready", self._scale.x(min(self._ready, self._scale.end)))

    def _below(self) -> Iterator[tuple[str, float, str, str]]:
        """Return the texts below the rows: class, place, text, alignment."""
        if self._ready is not None:
            x = self._scale.x(min(self._ready, self._scale.end))
            yield "n", x, headline(self._trace).partition(";")[0], "end" if x > _WIDTH / 2 else "start"
        if (calm := self._scale.calm) is not None:
            x = self._scale.x(sum(calm) / 2)
            text = f"not drawn in full: {format_seconds(calm[1] - calm[0])} of serving"
            yield "n", x, text, "end" if x > _WIDTH / 2 else "start"
        if text := describe_failure(self._trace):
            yield "n bad", _LEFT, _fit(f"✕ {text}", (_WIDTH - _LEFT - _RIGHT) / _CHARACTER), "start"

    def _labels(self) -> Iterator[str]:
        """Name nodes and ranks, as many as fit: first the rank that failed, then the slowest, then the others."""
        shift, free = self._bar / 2 + 3.5, -1.0
        for at in self._nodes:
            if self._tops[at] >= free:
                free = self._tops[at] + _FONT + 1
                yield _text("h", 4, self._tops[at] + shift, _fit(self._rows[at].host, _HOST_CHARACTERS))
        failed = self._trace.failure.rank if self._trace.failure else None
        slow = {phase.slowest for phase in self._slowest.values()}
        kinds = ["k bad" if row.rank == failed else "k slow" if row.rank in slow else "k" for row in self._rows]
        taken: list[float] = []
        for at in sorted(range(len(kinds)), key=lambda at: (("k bad", "k slow", "k").index(kinds[at]), at)):
            row, y = self._rows[at], self._tops[at] + shift
            if all(abs(y - other) >= _FONT + 1 for other in taken):
                taken.append(y)
                name = str(row.rank) if self._trace.layout else _fit(part_of(row), _RANK_CHARACTERS)
                yield _text(kinds[at], _LEFT - 8, y, name, "end")

    def _marks(self) -> Iterator[str]:
        """Mark how long the slowest of each phase was waited for, and where a rank failed."""
        for row, top in zip(self._rows, self._tops, strict=True):
            y = top + self._bar / 2
            for bar in row.bars:
                phase = self._slowest.get(bar.phase)
                wide = self._scale.x(bar.end) - self._scale.x(bar.begin) >= _MIN_MARKED
                if phase is not None and phase.slowest == row.rank and wide:
                    x = self._scale.x(bar.begin if phase.by_arrival else bar.own_end)
                    title = escape(f"rank {row.rank} was the slowest in {bar.phase}")
                    yield f'<path class="m" d="M{_n(x)} {_n(y)}l-4.5-8h9z"><title>{title}</title></path>'
            if self._trace.failure is not None and self._trace.failure.rank == row.rank:
                x = self._scale.x(row.bars[-1].end) if row.bars else _LEFT
                title = escape(describe_failure(self._trace))
                yield f'<path class="x" d="M{_n(x - 5)} {_n(y - 5)}l10 10m0-10l-10 10"><title>{title}</title></path>'


def _class(phase: str) -> str:
    return str(ORDER.index(phase)) if phase in ORDER else "x"


def _fit(text: str, room: float) -> str:
    """Cut a text to ``room`` characters of the picture's font."""
    if columns(text) <= room:
        return text
    while columns(text) > room - 1:
        text = text[:-1]
    return text + "…"


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{_n(x)}" y="{_n(y)}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
