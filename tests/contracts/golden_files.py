# SPDX-License-Identifier: Apache-2.0
"""All contracts by the name of their golden file, and what differs from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from tests.contracts import commands, documents, observed

GOLDEN = Path(__file__).with_name("golden")
CONTRACTS: dict[str, Callable[[], str]] = {**commands.CONTRACTS, **documents.CONTRACTS, **observed.CONTRACTS}
"""Makes the text of each."""


def path_of(name: str) -> Path:
    """Return a contract's golden file."""
    return GOLDEN / f"{name}.txt"


def difference(name: str, text: str) -> str:
    """Return what differs from the golden file as a unified diff; empty where nothing does."""
    path = path_of(name)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = (before.splitlines(), text.splitlines())
    return "\n".join(difflib.unified_diff(*lines, f"{name}, golden", f"{name}, now", lineterm="", n=1))
