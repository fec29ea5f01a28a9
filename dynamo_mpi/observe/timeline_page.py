# SPDX-License-Identifier: Apache-2.0
"""The page: every worker's picture, what it says in words, and the numbers. One file that loads nothing and runs nothing. Pure."""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING

from dynamo_mpi.observe.timeline import pack_starts
from dynamo_mpi.observe.timeline_bars import Placed, place
from dynamo_mpi.observe.timeline_facts import ORDER, describe_failure, facts_of, headline, identity, seconds, sentences
from dynamo_mpi.observe.timeline_scale import scale_for
from dynamo_mpi.observe.timeline_style import patterns, style_sheet
from dynamo_mpi.observe.timeline_svg import LEFT, RIGHT, WIDTH, draw, style_of
from dynamo_mpi.parallelism.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.observe.timeline import Start
    from dynamo_mpi.observe.timeline_facts import PhaseFacts
    from dynamo_mpi.observe.timeline_scale import Scale

DATA_BEGINS, DATA_ENDS = '<script type="application/json" id="dynamo-mpi-timeline">', "</script>"
# nothing is fetched, nothing is run, nothing is sent, whatever a name or an error text holds
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(starts: Sequence[Start]) -> str:
    """Return the page of one or more workers' starts.

    Args:
        starts: at least one, in the order in which they are to stand.
    """
    worlds, together = place(starts)
    shared = _scale(worlds) if together else None
    model = next((start.model for start in starts if start.model), "a deployment")
    workers = [start for start in starts if start.layout is not None]
    single = len(starts) == 1
    outcome = headline(workers[0]) if len(workers) == 1 else counted(len(workers), "worker")
    title = html.escape(f"Start of {model}: {outcome}")
    has_bad = any(start.failure is not None and start.failure.rank is not None for start in starts)
    facts = facts_of([row for world in worlds for row in world.rows])
    apart = '<p class="quiet">The starts lie far apart, so each has a time axis of its own.</p>'
    data = json.dumps(pack_starts(starts), separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{style_sheet()}</style></head><body>",
        f"<h1>{title}</h1>",
        *(() if single or together else (apart,)),
        _legend(facts, bad=has_bad),
        *(part for world in worlds for part in _section(world, shared, single)),
        patterns(),
        f"{DATA_BEGINS}{data}{DATA_ENDS}",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _scale(worlds: Sequence[Placed]) -> Scale:
    return scale_for([world.rows for world in worlds], LEFT, WIDTH - LEFT - RIGHT)


def _section(world: Placed, shared: Scale | None, single: bool) -> Iterator[str]:
    start, rows = world.start, world.rows
    facts = facts_of(rows)
    yield "<section>"
    if not single:
        outcome = f": {headline(start)}" if start.layout else ""
        yield f"<h2>{html.escape(start.name)}{html.escape(outcome)}</h2>"
    if start.layout:
        yield f'<p class="quiet">{html.escape(identity(start))}</p>'
    if text := describe_failure(start):
        yield f'<p class="failure">✕ {html.escape(text)}</p>'
    said = sentences(start, facts, rows)
    yield '<ul class="said">' + "".join(f"<li>{html.escape(line)}</li>" for line in said) + "</ul>"
    ready = None if start.ready is None else max(0.0, start.ready - world.origin)
    name = f"{start.name}: {headline(start)}. {'. '.join(said)}"
    yield f'<div class="picture">{draw(start, rows, shared or _scale([world]), ready, name)}</div>'
    if start.layout:
        yield _table(start, facts)
    yield "</section>"


def _legend(facts: Sequence[PhaseFacts], *, bad: bool) -> str:
    items = [
        f'<li><i class="c{style_of(fact.phase)}"></i>{html.escape(fact.phase)}</li>'
        for fact in facts
        if fact.phase in ORDER
    ]
    if others := [fact.phase for fact in facts if fact.phase not in ORDER]:
        items.append(f'<li><i class="cx"></i>{html.escape(", ".join(others))}</li>')
    if any(fact.ranks > 1 for fact in facts):
        waiting = style_of("load")
        items.append(f'<li><svg><rect class="w{waiting}" width="100%" height="100%"/></svg>waits for others</li>')
        items.append(
            '<li><svg viewBox="0 0 18 11"><path class="m" d="M9 10l-4.5-8h9z"/></svg>slowest of the phase</li>'
        )
    if bad:
        items.append('<li><svg viewBox="0 0 18 11"><path class="x" d="M4 0l10 10m0-10l-10 10"/></svg>failed</li>')
    return '<ul class="legend">' + "".join(items) + "</ul>"


def _table(start: Start, facts: Sequence[PhaseFacts]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(fact.phase)}</th>'
        + "".join(f"<td>{seconds(value)}</td>" for value in (fact.took, fact.least, fact.middle, fact.most))
        + f"<td>{html.escape(_who(fact))}</td></tr>"
        for fact in facts
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("phase", "took", "min", "median", "max", "slowest"))
    caption = html.escape(
        f"Phases of {start.name}; min, median and max are of the ranks' own parts where they are known"
    )
    return f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _who(fact: PhaseFacts) -> str:
    if fact.ranks == 1:
        return f"rank {fact.slowest} on {fact.host} alone"
    if not fact.is_uneven:
        return "-" if fact.goes_on or fact.phase == "serve" else "about equal"
    return f"rank {fact.slowest} on {fact.host}{' came to it last' if fact.came_last else ''}, +{seconds(fact.behind)}"
