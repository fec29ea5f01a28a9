# SPDX-License-Identifier: Apache-2.0
"""Colours and style sheet of the timeline's page.

Every phase's colour has a contrast of 4.5 to 1 with the page and with what is written on it (WCAG 2.2, 1.4.3 and 1.4.11), and phases
that follow each other can be told apart with any kind of colour blindness; tests/unit/test_timeline_colours.py measures both.
"""

from __future__ import annotations

from typing import NamedTuple

from dynamo_mpi.observe.timeline_facts import ORDER


class Scheme(NamedTuple):
    """Colours of one scheme.

    Args:
        page: behind everything.
        text: what is written.
        quiet: what is less important.
        line: of the grid.
        band: behind every second node.
        on_bar: what is written on a bar.
        bad: failures.
        phases: in the order of a life, and one for what is none of them.
    """

    page: str
    text: str
    quiet: str
    line: str
    band: str
    on_bar: str
    bad: str
    phases: tuple[str, ...]


LIGHT = Scheme(
    page="#ffffff",
    text="#1b1f24",
    quiet="#57606a",
    line="#d5dae0",
    band="#f3f5f7",
    on_bar="#ffffff",
    bad="#b3001b",
    phases=(
        "#6b7280",  # start
        "#332288",  # environment
        "#a8328f",  # world
        "#7a6200",  # preflight
        "#800040",  # probe
        "#0a6ebd",  # load
        "#b84a00",  # prove
        "#4b2a7b",  # register
        "#005c44",  # serve
        "#8c5a12",  # drain
        "#1f2328",  # exit
        "#5b6b8c",
    ),
)
DARK = Scheme(
    page="#14181d",
    text="#e8ecf1",
    quiet="#a5afba",
    line="#333b45",
    band="#1c2229",
    on_bar="#10141a",
    bad="#ff8a8a",
    phases=(
        "#c6ccd4",
        "#8f8cf0",
        "#f09ad8",
        "#d9b83a",
        "#ff6080",
        "#46a3e6",
        "#ff9a56",
        "#b08cf5",
        "#66e6b0",
        "#d8ab6a",
        "#9aa5b2",
        "#93a6cc",
    ),
)
SUFFIXES = (*map(str, range(len(ORDER))), "x")


def style_sheet() -> str:
    """Return the page's style sheet."""
    return "\n".join(
        (
            f":root{{color-scheme:light dark;{_variables(LIGHT)}}}",
            f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}",
            *(
                f".p{name}{{fill:var(--p{name})}}.w{name}{{fill:url(#h{name})}}.c{name}{{background:var(--p{name})}}"
                for name in SUFFIXES
            ),
            _REST,
        )
    )


def patterns() -> str:
    """Return the hatches that waiting is drawn with, for all pictures of a page."""
    tiles = "".join(
        f'<pattern id="h{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect class="p{name}" width="6" height="6" opacity=".16"/><rect class="p{name}" width="1.6" height="6" opacity=".75"/></pattern>'
        for name in SUFFIXES
    )
    return f'<svg class="hatches" aria-hidden="true" width="0" height="0"><defs>{tiles}</defs></svg>'


def _variables(scheme: Scheme) -> str:
    named = {name: value for name, value in scheme._asdict().items() if name != "phases"}
    named |= {f"p{name}": colour for name, colour in zip(SUFFIXES, scheme.phases, strict=True)}
    return ";".join(f"--{name.replace('_', '-')}:{value}" for name, value in named.items())


_REST = """\
body{margin:0 auto;padding:1.5rem;max-width:1400px;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .2rem;overflow-wrap:anywhere}
p{margin:.2rem 0;overflow-wrap:anywhere}
.quiet{color:var(--quiet)}
.failure{color:var(--bad);border-left:4px solid var(--bad);padding:.2rem .7rem;margin:.6rem 0;font-weight:600}
.said{margin:.5rem 0;padding:0;list-style:none;font-size:1.05rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.8rem 0;padding:0;list-style:none;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend i{width:1.5em;height:.9em;border-radius:2px}
.legend svg{width:1.5em;height:.9em}
.picture{overflow-x:auto}
.picture svg{display:block;width:100%;min-width:720px}
.hatches{position:absolute}
svg text{font:11px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:var(--text)}
svg .r rect{height:var(--h)}
svg .band{fill:var(--band)}
svg .grid{stroke:var(--line);fill:none}
svg .torn{stroke:var(--page);stroke-width:7;fill:none}
svg .gap{stroke:var(--text);stroke-width:1.2;fill:none}
svg .ready{stroke:var(--text);stroke-width:1.4;stroke-dasharray:5 3;fill:none}
svg .t,svg .h{fill:var(--quiet)}
svg .i{fill:var(--on-bar);pointer-events:none}
svg .o{pointer-events:none}
svg .slow{font-weight:700}
svg .bad{fill:var(--bad);font-weight:700}
svg .m{fill:var(--text);stroke:var(--page);stroke-width:1.4}
svg .x{stroke:var(--bad);stroke-width:3;fill:none}
table{border-collapse:collapse;margin:.8rem 0;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--quiet);padding-bottom:.3rem}
th,td{text-align:right;padding:.2rem .8rem;border-bottom:1px solid var(--line)}
td{white-space:nowrap}
td:last-child{white-space:normal;overflow-wrap:anywhere}
th:first-child,td:last-child,th:last-child{text-align:left}
@media print{body{max-width:none}}"""
