# SPDX-License-Identifier: Apache-2.0
"""Commands in the README, in getting-started and in the guides: each block is run by a test, or says that it isn't."""

from __future__ import annotations

import ast

import pytest

from dynamo_mpi.common.errors import ExitCode
from tests.conftest import ROOT
from tests.pages import blocks

PAGES = [
    "README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "getting-started").glob("*.md"))),
]
SHELL = ("sh", "console")
# .ci/run itself runs them
BY_CI = {("README.md", "two-commands")}


def words_of_tests() -> set[str]:
    """Return all strings in the tests, by which they would name a block."""
    return {
        node.value
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_has_a_test_or_says_why_not(page: str) -> None:
    named = words_of_tests()
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        assert block.language, f"a fence without a language: {block.lines[:1]}"
        if block.language in SHELL and (page, block.name) not in BY_CI:
            assert block.is_not_run or {page, block.name} <= named, f"no test runs {block.commands[:1]}"


def test_troubleshooting_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert code is ExitCode.OK or f"\n### Exit code {code.value}\n" in text
