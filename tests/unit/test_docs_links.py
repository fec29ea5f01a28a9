# SPDX-License-Identifier: Apache-2.0
"""Relative links in the pages at the top, in findings/ and docs/ lead somewhere, to the heading too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^ {4}.*$|`[^`\n]*`", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the names by which GitHub's pages link to headings."""
    text = re.sub(r"^ {4}.*$", "", _FENCE.sub("", text), flags=re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {"".join(c for c in title.strip().lower() if c.isalnum() or c in " -_").replace(" ", "-") for title in found}


def broken(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    bad = []
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", text).replace("[`", "[").replace("`](", "]("))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_a_link_to_nowhere_is_found() -> None:
    page = ROOT / "README.md"
    text = "[a](docs/reference/rules.md#rules) [b](docs/none.md) [c](docs/reference/rules.md#none) [d](https://x.org/) `[e](none)`\n"
    assert broken(page, text) == ["docs/none.md", "docs/reference/rules.md#none"]
