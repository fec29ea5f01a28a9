# SPDX-License-Identifier: Apache-2.0
"""Text of others on a terminal, in a table, or in a command that a person pastes. Pure.

Names of models, hosts and folders, and whatever comes from a file or the network, may hold control characters: raw, they move the cursor,
set the terminal's title, hide what stands before them, or end a quoted word.
"""

from __future__ import annotations

import re

DISPLAY_CHARACTERS = 256
# a terminal's colours; control characters but newline and tab; those that reorder or hide text
_CONTROLS = "\x1b\\[[0-9;]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"


def sanitize(text: str, max_characters: int = DISPLAY_CHARACTERS) -> str:
    """Return a text that is safe to display on one line: non-printable characters are escaped, and a long text is cut."""
    cut = text[: max_characters + 1]
    safe = cut if cut.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in cut)
    return safe if len(safe) <= max_characters else safe[: max_characters - 1] + "…"


def sanitize_lines(text: str, max_characters: int) -> str:
    """Return a text of several lines that is safe to display, see `sanitize`."""
    cut = text[: max_characters + 1]
    lines = "\n".join(sanitize(line, max_characters) for line in cut.split("\n"))
    return lines if len(lines) <= max_characters else lines[: max_characters - 1] + "…"


def without_controls(text: str) -> str:
    """Return a text of any length without colours, and with other control characters as JSON escapes them; newlines and tabs stay."""
    # compiled at first use: ranks import this module, and most have no such text
    return re.sub(_CONTROLS, lambda match: f"\\u{ord(match[0]):04x}" if len(match[0]) == 1 else "", text)


def shell_word(text: object) -> str:
    """Quote a word for a command that a person pastes into a shell; a word with control characters as bash's ``$'…'``."""
    word = str(text)
    if word.isprintable():
        import shlex  # ranks import this module, and quote nothing

        return shlex.quote(word)
    data = word.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
