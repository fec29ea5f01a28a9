# SPDX-License-Identifier: Apache-2.0
"""What the pages tell their readers to type: blocks of code, with the names by which tests find them.

A block of commands stands in a fence (``sh``, or ``console`` with its output) behind a line ``<!-- test: NAME -->``.
What can't be run by a test begins with a comment that says why: ``# not run here: needs GPUs``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.conftest import ROOT

NOT_RUN = "# not run here: "
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- test: (?P<name>[\w-]+) -->\n)?^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<text>.*?)^[ ]*```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Args:
        name: by which a test finds it; empty without one.
        language: of its fence.
        lines: without the fence and its indentation.
    """

    name: str
    language: str
    lines: tuple[str, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """What is typed: all lines but comments, or behind ``$`` where the output stands there, too."""
        if self.language == "console":
            return tuple(line.removeprefix("$ ") for line in self.lines if line.startswith("$ "))
        return tuple(line for line in self.lines if line and not line.startswith("#"))

    @property
    def is_not_run(self) -> bool:
        """Whether it says that it is not run, and why."""
        return any(line.startswith(NOT_RUN) and len(line) > len(NOT_RUN) for line in self.lines)


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in _BLOCK.finditer(text):
        indent = len(found["indent"])
        yield Block(found["name"] or "", found["language"], tuple(line[indent:] for line in found["text"].splitlines()))


def commands(page: str, name: str) -> list[str]:
    """Return what a page, by its path from the top, tells its readers to type in the block of that name."""
    (block,) = (one for one in blocks((ROOT / page).read_text(encoding="utf-8")) if one.name == name)
    return list(block.commands)
