# SPDX-License-Identifier: Apache-2.0
"""How verbs write for a person: colours where a terminal shows them, plain text when piped."""

from __future__ import annotations

import os
import re
from typing import TextIO

_COLOURS = {"error": "31;1", "warning": "33;1", "info": "36", "ok": "32;1"}
_SEVERITY = re.compile(r"^(error|warning|info|ok)\b", re.MULTILINE)


def wants_colour(stream: TextIO) -> bool:
    """May colours be written? ``NO_COLOR`` over ``FORCE_COLOR`` over whether it is a terminal (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR") or os.environ.get("CLICOLOR_FORCE"):
        return True
    return stream.isatty()


def paint(text: str, stream: TextIO) -> str:
    """Colour the word that a line begins with, where it says how bad things are."""
    if not wants_colour(stream):
        return text
    return _SEVERITY.sub(lambda match: f"\x1b[{_COLOURS[match[0]]}m{match[0]}\x1b[0m", text)
