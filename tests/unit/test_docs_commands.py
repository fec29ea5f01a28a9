# SPDX-License-Identifier: Apache-2.0
"""Commands in the README, in getting-started and in the guides: each block is run by a test, or says that it isn't."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from dynamo_mpi.common.errors import ExitCode
from tests.conftest import ROOT
from tests.pages import blocks

FOLDERS = ("getting-started", "guides")
PAGES = [
    "README.md",
    *(str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / "docs" / folder).glob("*.md"))),
]
SHELL = ("sh", "console", "python")
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


@pytest.mark.parametrize("page", PAGES)
def test_there_is_no_block_without_a_fence(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    # in a list, an indented line goes on with its item
    assert re.findall(r"^(?! *(?:[-*]|\d+\.) ).*\n\n {4}\S.*$", text, re.MULTILINE) == []


def test_troubleshooting_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert code is ExitCode.OK or f"\n### Exit code {code.value}\n" in text


def test_messages_in_troubleshooting_are_said() -> None:
    """What stands there as a message of ours is in a source; other programs' words are in the last table."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = text.partition("\n## By message\n")[2].partition("\n### From MPI and Slurm\n")[0]
    said = " ".join(
        re.sub(r"\s+", " ", part)
        for path in (ROOT / "dynamo_mpi").rglob("*.py")
        for part in _texts(ast.parse(path.read_text(encoding="utf-8")))
    )
    missing = []
    for row in re.findall(r"^\| (`.*?) \|", ours, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", row):
            words = [piece.split() for piece in message.removeprefix("error ").split("…")]
            # what a placeholder stands for may be written out
            runs = [" ".join(part[at : at + 3]) for part in words for at in range(max(1, len(part) - 2)) if part]
            missing += [] if any(run in said for run in runs) else [message]
    assert missing == []


def _texts(tree: ast.AST) -> Iterator[str]:
    """Yield all strings, with a placeholder's place closed up by a mark."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
