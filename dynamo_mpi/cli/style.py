# SPDX-License-Identifier: Apache-2.0
"""Output of verbs: with colours on a terminal, plain text otherwise."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TextIO

from dynamo_mpi.common.display import without_controls
from dynamo_mpi.common.errors import UsageError

_COLOURS = {"error": "31;1", "warning": "33;1", "info": "36", "ok": "32;1", "skipped": "2"}


def wants_colour(stream: TextIO) -> bool:
    """Return whether to write colours: ``NO_COLOR`` overrides ``FORCE_COLOR``, and that whether it is a terminal (no-color.org,
    force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR") or os.environ.get("CLICOLOR_FORCE"):
        return True
    return stream.isatty()


def paint(text: str, stream: TextIO) -> str:
    """Colour the severity at the beginning of each line."""
    if not wants_colour(stream):
        return text
    import re  # here, and so compiled only for a terminal

    severities = re.compile(rf"^({'|'.join(_COLOURS)})\b", re.MULTILINE)
    return severities.sub(lambda match: f"\x1b[{_COLOURS[match[0]]}m{match[0]}\x1b[0m", text)


@cache
def terminal_width() -> int:
    """Return the columns of the terminal, as `shutil.get_terminal_size` does, whose import takes milliseconds."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def write_out(text: str) -> None:
    """Write a verb's data to stdout. Control characters in it, from a name or a file, don't reach the terminal.

    Raises:
        BrokenPipeError: the reader has exited.
        UsageError: stdout is closed, or can't be written.
    """
    if sys.stdout is None:
        raise UsageError(
            "stdout is closed", expected="somewhere to write the answer to", fix="open it: >FILE, or | less"
        )
    text = without_controls(text)
    try:
        try:
            print(paint(text, sys.stdout), flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "replace").decode(error.encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise UsageError(
            f"stdout can't be written: {error.strerror}",
            expected="room for the answer",
            fix="free some space, or write elsewhere",
        ) from None


def silence_stdout() -> None:
    """Redirect stdout to /dev/null: otherwise Python reports another error when it flushes stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
