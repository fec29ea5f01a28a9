# SPDX-License-Identifier: Apache-2.0
"""The pages as Sphinx takes them: links lead to pages and files of the site, and the entrance has all pages in its navigation."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

# pages that stand outside of docs/, and their place in the site
OUTSIDE = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security-reports.md",
    "findings/README.md": "project/findings.md",
    "engine_configs/README.md": "project/engine-configs.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^ *```.*?^ *```$|^ {4}[^\n]*$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LABEL_OF_CODE = re.compile(r"\[`([^`\n]*)`\]\(([^)\s]+)\)")
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def stage(root: Path, target: Path) -> None:
    """Write all pages, and the files that they link to, into an empty folder.

    Args:
        root: the checkout.
        target: Sphinx' source folder.
    """
    pages = {path: str(path.relative_to(root / "docs")) for path in sorted((root / "docs").rglob("*.md"))}
    pages |= {root / outside: place for outside, place in OUTSIDE.items()}
    for page, place in pages.items():
        text = _relinked(page, place, root, pages, target)
        if place == "index.md":
            text += navigation(text)
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_text(text, encoding="utf-8")


def navigation(index: str) -> str:
    """Return the navigation: under each section of the entrance the pages that it links to, in their order."""
    parts, seen = [""], set[str]()
    titles = _SECTION.split(index)
    for title, section in zip(titles[1::2], titles[2::2], strict=True):
        places = [link.partition("#")[0] for _, _, link in _LINK.findall(section) if ":" not in link]
        new = [place for place in dict.fromkeys(places) if place.endswith(".md") and place not in seen]
        seen.update(new)
        if new:
            parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *new, "```", ""]))
    if first := sorted(
        {link for _, _, link in _LINK.findall(titles[0]) if ":" not in link and link.endswith(".md")} - seen
    ):
        parts.insert(1, "\n".join(["```{toctree}", ":hidden:", "", *first, "```", ""]))
    return "\n".join(parts)


def _relinked(page: Path, place: str, root: Path, pages: dict[Path, str], target: Path) -> str:
    """Return a page with its links changed to the places in the site; what isn't there is named without a link."""

    def link(found: re.Match[str]) -> str:
        mark, label, address = found.groups()
        path, _, anchor = address.partition("#")
        if re.match(r"[a-z]+:", address) or not path:
            return found[0]
        source = Path(os.path.normpath(page.parent / path))
        where = pages.get(source)
        if where is None and source.is_file():
            where = f"files/{source.relative_to(root)}"
            (target / where).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / where)
        if where is None:
            return label
        there = os.path.relpath(where, Path(place).parent)
        return f"{mark}[{label}]({there}{'#' + anchor if anchor else ''})"

    text = page.read_text(encoding="utf-8")
    # labels that are code, such as [`file`](file), are links too
    text = _LABEL_OF_CODE.sub("[\0\\1\0](\\2)", text)
    parts = _CODE.split(text)
    return "".join(part if at % 2 else _LINK.sub(link, part) for at, part in enumerate(parts)).replace("\0", "`")
