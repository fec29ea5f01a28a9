# SPDX-License-Identifier: Apache-2.0
"""docs/concepts/security.md: the table of listeners in a page that is otherwise written by hand."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.ops.listeners import markdown_table

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "security.md"
_HEADING = "\n## What listens\n"


def render() -> str:
    """Return the page with the table as it is today."""
    before, heading, after = _PAGE.read_text(encoding="utf-8").partition(_HEADING)
    text, _, rest = after.partition("\n| process |")
    _, _, others = rest.partition("\n\n")
    return f"{before}{heading}{text}\n{markdown_table()}\n{others}"
