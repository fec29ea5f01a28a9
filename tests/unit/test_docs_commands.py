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
# functions of tests/pages.py by which a test reads a block
READERS = ("block_of", "commands", "run_lines")


def blocks_in_tests() -> set[tuple[str, str]]:
    """Return page and name of each block that a test reads, by one of `READERS`."""
    return {
        pair
        for path in (ROOT / "tests").rglob("test_*.py")
        if "tests.pages" in (text := path.read_text(encoding="utf-8"))
        for pair in blocks_read_in(ast.parse(text))
    }


def blocks_read_in(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield page and name of each block that a test's module reads.

    The arguments of a reader are strings, constants of the module, or names that ``parametrize`` or a comprehension gives values; with a
    table ``BLOCKS`` of a page's blocks, its entries.
    """
    constants = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
        tables = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} & constants.keys()
        for call in ast.walk(function):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in READERS):
                continue
            page, name = call.args
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield from ((one, name.value) for one in _values(page, function, constants))
                continue
            # BLOCKS[page], or a comprehension over BLOCKS.items()
            used = {node.id for node in ast.walk(name) if isinstance(node, ast.Name)} & tables or tables
            for table in used:
                if isinstance(entries := constants[table], ast.Dict):
                    yield from _entries(entries)


def _values(node: ast.expr, function: ast.FunctionDef, constants: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the strings that an argument has."""
    if isinstance(node, ast.Name):
        if node.id in constants:
            yield from _values(constants[node.id], function, constants)
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.args[0]) == repr(node.id):
                yield from ast.literal_eval(mark.args[1])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _entries(table: ast.Dict) -> Iterator[tuple[str, str]]:
    try:
        entries = ast.literal_eval(table)
    except ValueError:
        return  # of other things
    for page, names in entries.items():
        if str(page).endswith(".md"):
            yield from ((page, name) for name in ([names] if isinstance(names, str) else names))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_has_a_test_or_says_why_not(page: str) -> None:
    tested = blocks_in_tests() | BY_CI
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        assert block.language, f"a fence without a language: {block.lines[:1]}"
        if block.language in SHELL and not block.is_not_run:
            assert (page, block.name) in tested, f"no test runs {block.commands[:1]}"


def test_every_block_that_a_test_reads_is_in_its_page() -> None:
    there = {
        (page, block.name)
        for page in {page for page, _ in blocks_in_tests()}
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
    }
    assert blocks_in_tests() <= there


def test_a_block_counts_as_read_by_its_page_and_name_alone() -> None:
    source = """
PAGE, OTHER = "a.md", "b.md"
GUIDE = "g.md"
BLOCKS = {"a.md": "one", "b.md": ("two", "three")}
UNUSED = {"c.md": "one"}
def test_constants():
    assert "not-read" in commands(GUIDE, "check") + commands("h.md", "plan")
@pytest.mark.parametrize("page", ["i.md", "j.md"])
def test_pages(page):
    run_lines(page, "sbatch")
@pytest.mark.parametrize("page", BLOCKS)
def test_table(page):
    block_of(page, BLOCKS[page])
"""
    assert set(blocks_read_in(ast.parse(source))) == {
        *(("g.md", "check"), ("h.md", "plan"), ("i.md", "sbatch"), ("j.md", "sbatch")),
        *(("a.md", "one"), ("b.md", "two"), ("b.md", "three")),
    }


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
    said = {
        re.sub(r"\s+", " ", part)
        for path in (ROOT / "dynamo_mpi").rglob("*.py")
        for part in _texts(ast.parse(path.read_text(encoding="utf-8")))
    }
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", ours, re.MULTILINE) for message in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 30
    assert [message for message in messages if not is_said(message, said)] == []


def is_said(message: str, said: set[str]) -> bool:
    """Return whether all fixed parts of a message, between its ``…``, are in one string, in this order; a rule's id is one of its own."""
    rule, _, words = (
        message.removeprefix("error ").rpartition(": ") if message.startswith("error ") else ("", "", message)
    )
    if re.fullmatch(r"[A-Z]\d+", words):
        return words in said
    parts = re.compile(".*".join(re.escape(part.strip()) for part in words.split("…")))
    return (not rule or rule in said) and any(map(parts.search, said))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("that takes … nodes, and … has …", True),
        ("that takes … hosts, and … has …", False),
        ("and … has … that takes", False),
        ("takes 4 nodes", False),
        ("error V2: free memory", True),
        ("error V3: free memory", False),
        ("error V2", True),
        ("V3", False),
    ],
)
def test_a_message_is_said_with_all_its_fixed_parts_alone(message: str, expected: bool) -> None:
    assert is_said(message, {"that takes \0 nodes, and \0 has \0", "V2", "too little free memory"}) is expected


def _texts(tree: ast.AST) -> Iterator[str]:
    """Yield all strings, with a placeholder's place closed up by a mark."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
