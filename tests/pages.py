# SPDX-License-Identifier: Apache-2.0
"""What readers type from the pages: blocks of code, with the names by which tests find them.

A block of commands stands in a fence (``sh``, or ``console`` with its output) behind a line ``<!-- test: NAME -->``.
What can't be run by a test begins with a comment that says why, ``# not run here: needs GPUs``; a single line of that
kind ends with it.
"""

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
    def output(self) -> tuple[str, ...]:
        """What stands there as the output, of a ``console``: whole lines only, without those that are cut by ``...``."""
        lines = (line for line in self.lines if not line.startswith(("$ ", "#")))
        return tuple(line for line in lines if line and not line.endswith("..."))

    @property
    def is_not_run(self) -> bool:
        """Whether it says that it is not run, and why."""
        return self.lines[0].startswith(NOT_RUN) and len(self.lines[0]) > len(NOT_RUN)


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in _BLOCK.finditer(text):
        indent = len(found["indent"])
        yield Block(found["name"] or "", found["language"], tuple(line[indent:] for line in found["text"].splitlines()))


def block_of(page: str, name: str) -> Block:
    """Return the block of that name in a page, which is named by its path from the top."""
    (block,) = (one for one in blocks((ROOT / page).read_text(encoding="utf-8")) if one.name == name)
    return block


def commands(page: str, name: str) -> list[str]:
    """Return what a reader types from a page's block of that name."""
    return list(block_of(page, name).commands)


def run_lines(page: str, name: str) -> list[str]:
    """Return the same, without the lines that say that they are not run."""
    return [line for line in commands(page, name) if NOT_RUN not in line]
