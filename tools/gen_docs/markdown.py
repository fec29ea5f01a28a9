# SPDX-License-Identifier: Apache-2.0
"""Markdown out of what the code says of itself. Pure, but for reading a class's source."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WRITTEN = "This page is written from the code by `make docs`, and a test fails when it is stale.\n"
_ENTRY = re.compile(r"    (\w+): (.*)")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Cells are Markdown already, but for what would end one."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def code(*texts: str) -> str:
    """Return texts as code, with commas between."""
    return ", ".join(f"`{text}`" for text in texts)


def argument_notes(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of each of its ``Args``, on one line each."""
    notes: dict[str, str] = {}
    name = ""
    _, _, section = (inspect.getdoc(kind) or "").partition("Args:\n")
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if found := _ENTRY.fullmatch(line):
            name = found[1]
            notes[name] = found[2]
        elif name:
            notes[name] += " " + line.strip()
    return {name: plain(note) for name, note in notes.items()}


def member_notes(kind: type) -> dict[str, str]:
    """Return the text that follows each member of a class in its source, as enumerations here have it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 - it is the source of a class
    notes: dict[str, str] = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        match before, after:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                notes[name] = plain(text)
    return notes


def plain(text: str) -> str:
    """Return a docstring's text as Markdown, on one line."""
    return " ".join(text.split()).replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|") if text else "-"
