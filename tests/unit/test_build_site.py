# SPDX-License-Identifier: Apache-2.0
"""The site of the pages: its links lead to places in it, and its entrance has every page; the site itself where Sphinx can be installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_docs_links import broken
from tools.build_site.stage import OUTSIDE, navigation, stage


def test_links_of_the_site_lead_somewhere_in_it(tmp_path: Path) -> None:
    stage(ROOT, tmp_path)
    pages = sorted(tmp_path.rglob("*.md"))
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md"))) + len(OUTSIDE)
    assert {page.name: broken(page, page.read_text(encoding="utf-8")) for page in pages} == {
        page.name: [] for page in pages
    }
    assert (tmp_path / "files" / "monitoring" / "alerts.yml").is_file()


def test_every_page_is_reached_from_the_entrance(tmp_path: Path) -> None:
    stage(ROOT, tmp_path)
    places = [str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.md")]
    lines = navigation((tmp_path / "index.md").read_text(encoding="utf-8").partition("```{toctree}")[0]).splitlines()
    listed = [line for line in lines if line.endswith(".md")]
    assert sorted([*listed, "index.md"]) == sorted(places)


@pytest.mark.full
@pytest.mark.slow
def test_sphinx_builds_the_site_without_a_warning(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    wanted = ["sphinx>=8", "myst-parser>=4", "furo"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    words = [python, "-m", "tools.build_site", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit code 78" in (tmp_path / "site" / "troubleshooting.html").read_text(encoding="utf-8")
