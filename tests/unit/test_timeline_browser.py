# SPDX-License-Identifier: Apache-2.0
"""The timeline's page in a real browser: what is drawn, that it can be read, and that it loads and runs nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_mpi.telemetry.startup_trace import StartupTrace
from dynamo_mpi.telemetry.timeline_page import DARK, LIGHT, page
from tests.browser import Browser, find_browser
from tests.unit.timelines import BEGAN, HOSTILE, services, skewed, start_of

pytestmark = pytest.mark.slow

# what the page looks like to the browser; a text's box has two pixels of air above and below its letters
LOOK = """
const svgs = [...document.querySelectorAll('.picture svg')];
const box = e => { const b = e.getBBox(), m = e.parentNode.classList.contains('r') ? e.parentNode.transform.baseVal[0].matrix : {e: 0, f: 0};
  return {x: b.x + m.e, y: b.y + m.f, w: b.width, h: b.height, text: e.textContent}; };
const outside = [], over = [];
for (const svg of svgs) {
  const view = svg.viewBox.baseVal, texts = [...svg.querySelectorAll('text')].map(box);
  const shapes = [...svg.querySelectorAll('.r rect, .m, .x')].map(box);
  for (const b of [...texts, ...shapes])
    if (b.x < -0.5 || b.y < -0.5 || b.x + b.w > view.width + 0.5 || b.y + b.h > view.height + 0.5) outside.push(b);
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
    if (a.x < b.x + b.w && b.x < a.x + a.w && a.y + 2 < b.y + b.h - 2 && b.y + 2 < a.y + a.h - 2) over.push([a, b]); }));
}
const colour = (selector, what) => { const e = document.querySelector(selector); return e && getComputedStyle(e)[what]; };
return {
  bars: svgs.map(svg => svg.querySelectorAll('.b').length),
  rows: svgs.map(svg => svg.querySelectorAll('.r').length),
  slowest: svgs.map(svg => [...svg.querySelectorAll('.m title')].map(e => e.textContent)),
  failed: [...document.querySelectorAll('.picture .x title')].map(e => e.textContent),
  texts: svgs.map(svg => svg.querySelectorAll('text').length), outside, over,
  resources: performance.getEntriesByType('resource').map(e => e.name),
  scripts: [...document.scripts].filter(e => e.type != 'application/json').length,
  images: document.images.length, links: document.querySelectorAll('link,a,iframe,object,embed').length,
  page: colour('body', 'backgroundColor'), text: colour('.picture text', 'fill'), load: colour('.p4', 'fill'),
  height: colour('.r rect', 'height'), wide: document.documentElement.scrollWidth <= innerWidth,
};
"""


@pytest.fixture(scope="module")
def browser() -> Browser:
    return find_browser()


CASES: dict[str, list[StartupTrace]] = {
    "3 ranks": [start_of(3, 3, load=2.5)],
    "16 ranks": [start_of(16)],
    "512 ranks": [start_of(512)],
    "512 nodes": [start_of(512, 1, host="a-rather-long-name-of-a-host-{:03}.cluster")],
    "served for hours": [start_of(16, serving=7980.0)],
    "failed": [start_of(16, failed=11)],
    "two workers": [start_of(8), start_of(16, name="decode-0", began=BEGAN + 20)],
    "hostile": [start_of(4, 2, model=HOSTILE, host="n{}" + HOSTILE, name=HOSTILE, failed=2)],
    "clocks that disagree": [skewed()],
    "services": [services(), start_of(3, 3)],
    "wide letters": [start_of(3, 1, model="模型", host="節点節点節点節点節点節点{}")],
}


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.fixture(scope="module")
def looks(browser: Browser) -> dict[str, Any]:
    """How all cases look in the browser."""
    seen = browser.load(*(page(starts) for starts in CASES.values()), script=LOOK)
    assert seen.console == []
    assert seen.fetched == []
    return dict(zip(CASES, seen.results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_everything_is_drawn_where_it_can_be_read(looks: dict[str, Any], case: str) -> None:
    starts, found = CASES[case], looks[case]
    assert found["bars"] == [sum(len(rank.spans) for rank in start.ranks) for start in starts]
    assert found["rows"] == [len(start.ranks) for start in starts]
    assert all(number > 0 for number in found["texts"])
    assert found["outside"] == []
    assert found["over"] == []
    assert found["wide"]
    assert (found["scripts"], found["images"], found["links"], found["resources"]) == (0, 0, 0, [])


@pytest.mark.parametrize("case", [case for case in CASES if case != "clocks that disagree"])
def test_the_slowest_and_the_one_that_failed_are_marked(looks: dict[str, Any], case: str) -> None:
    starts, found = CASES[case], looks[case]
    for start, slowest in zip(starts, found["slowest"], strict=True):
        loads = f"rank {len(start.ranks) * 3 // 4} was the slowest in load"
        assert (loads in slowest) is (start.failure is None and start.layout is not None)
    failures = [start.failure for start in starts if start.failure]
    assert len(found["failed"]) == len(failures)
    for failure, title in zip(failures, found["failed"], strict=True):
        assert title == f"rank {failure.rank} on {failure.host}: {failure.error}"


def test_the_page_goes_by_the_users_scheme(browser: Browser, looks: dict[str, Any]) -> None:
    dark = browser.load(page(CASES["3 ranks"]), script=LOOK, dark=True).results[0]
    for found, scheme in ((looks["3 ranks"], LIGHT), (dark, DARK)):
        colours = (found["page"], found["text"], found["load"])
        assert colours == (rgb(scheme.page), rgb(scheme.quiet), rgb(scheme.phases[4]))


def test_the_page_as_it_is_written_fetches_and_says_nothing(browser: Browser) -> None:
    seen = browser.load(page(CASES["512 ranks"]), page(CASES["hostile"]))
    assert (seen.console, seen.fetched) == ([], [])


def test_the_browser_reports_what_is_wrong(browser: Browser) -> None:
    """What the other tests look at: errors on the console, texts over each other and outside, what is fetched."""
    texts = '<text x="10" y="50">vm</text><text x="1190" y="50">vm vm</text></svg></div>'
    strange = (
        '<script>console.error("wrong")</script><img src="missing.png"><img src="http://example.org/x.png"></body>'
    )
    bad = page(CASES["3 ranks"]).replace("</svg></div>", texts).replace("</body>", strange)
    seen = browser.load(bad, script=LOOK)
    (found,) = seen.results
    assert any("wrong" in line for line in seen.console)
    assert [box["text"] for box in found["outside"]] == ["vm vm"]
    assert found["over"]
    assert (found["scripts"], found["images"]) == (1, 2)
    assert any(url.endswith("missing.png") for url in found["resources"])
    there, here = sorted(seen.fetched, key=lambda url: "127.0.0.1" in url)
    assert (there, here.endswith("/missing.png")) == ("http://example.org/x.png", True)
    refused = browser.load(bad)
    assert any("Content Security Policy" in line for line in refused.console)
    assert refused.fetched == []
