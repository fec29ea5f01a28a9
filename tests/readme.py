# SPDX-License-Identifier: Apache-2.0
"""What README.md tells its readers to type."""

from __future__ import annotations

from tests.conftest import ROOT


def commands_after(sentence: str) -> list[str]:
    """Return the lines of the first indented block after a sentence that begins so, up to the first that is output."""
    lines = iter((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(sentence):
            break
    block: list[str] = []
    for line in lines:
        if line.startswith("    "):
            block.append(line[4:])
        elif block and line:
            break
    commands = [line for line in block if line]
    ends = [number for number, line in enumerate(commands) if line.startswith(" ")]
    return commands[: ends[0]] if ends else commands
